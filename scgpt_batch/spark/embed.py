"""The main job: rows of AnnData in Delta -> registered model -> embeddings, ledger and runs in Delta.

Rows that already have a result for their content, model version and parameters are skipped. The pending rows are
processed in waves of bounded size. Each wave commits its embeddings first, then its ledger lines. A killed run leaves
at most one wave of embeddings without ledger lines: for the next run these rows are pending, and it replaces them.

Rows with the same `sample_id` share preprocessing decisions, and contextual mode averages over all their cells: the
embeddings then have the sample's id as adata_id, while the ledger has one line per row. Each run first removes the
results of rows and samples that are no longer in the input.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.metadata import version as installed_version
from typing import Any

import mlflow
import pandas as pd
from pyspark.accumulators import Accumulator
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.utils import is_remote

import scgpt_batch
from scgpt_batch.command_result import OK, TOO_MANY_FAILED_ROWS, CommandResult, plural
from scgpt_batch.errors import ConfigError, in_one_line, plain_line
from scgpt_batch.inference.engine import check_model_parameters
from scgpt_batch.inference.results import warning_kind
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.sample_statistics import rows_depend
from scgpt_batch.registry.register import use_experiment
from scgpt_batch.registry.resolve import ResolvedModel, resolve
from scgpt_batch.registry.sample_answers import code_difference, registered_by
from scgpt_batch.settings import EmbedSettings
from scgpt_batch.spark import tables
from scgpt_batch.spark.capacity import (
    CALCULATED,
    MEASURED,
    Capacity,
    capacities,
    capacity,
    duration,
    output_bytes,
    rate,
    size,
)
from scgpt_batch.spark.lineage import log_input
from scgpt_batch.spark.maintain import prune
from scgpt_batch.spark.pending import PendingRows, key_range_filter, n_tasks, pending_rows, sample_hash, with_tasks
from scgpt_batch.spark.persistence import require_persist
from scgpt_batch.spark.progress import CellProgress
from scgpt_batch.spark.sample_decisions import decisions, means
from scgpt_batch.spark.search_table import create_search_table, update_search_table
from scgpt_batch.spark.vanished import Vanished, earlier_runs, unfinished, vanished
from scgpt_batch.spark.worker import ANSWERS, VECTORS, ModelRef, WorkerTask, embed_rows, static_vectors
from scgpt_batch.spark.workers import computed, worker_setup_error

logger = logging.getLogger(__name__)

Line = dict[str, str | float | datetime]  # of the table of runs

CELLS_TO_TELL = 1_000  # a run over fewer cells spends most of its time on starting
LIBRARIES_MB, ROW_MB_PER_1000_CELLS = 900, 120  # of a worker, measured: torch and scanpy; 2,000 genes per cell
CONCURRENT_DAYS = 2  # look back this far for concurrent runs; from midnight, so at least a day in any time zone

PAYLOAD = (
    "adata_id", "sample_id", "content_hash", "adata_sparsematrix", "x_data", "x_indices", "x_indptr", "n_obs", "n_vars",
    "adata_obs", "adata_var", "x_dtype", "decisions",
)  # fmt: skip
# Packages whose version can cause one of `RETRIED_ERRORS`: the row is tried again when one of them changes.
LIBRARIES = ("scgpt_batch", "anndata", "numpy", "pandas", "pyarrow", "scanpy", "scipy", "torch")
OTHER_CODE = "+other-code"  # appended to the package version of runs that --allow-other-code permitted
RETRIED_ERRORS = ("InternalError", "WorkerCrash", "Timeout")


@dataclass(frozen=True, kw_only=True)
class EmbedResult(CommandResult):
    """What a run did."""

    run_id: str
    mode: str
    model_uri: str
    model_version: str
    rows_in: int
    rows_ok: int
    rows_failed: int
    rows_skipped: int
    rows_removed: int
    cells: int
    embeddings: int
    warnings: dict[str, int]  # rows by kind of warning
    seconds: float
    output_table: str
    ledger_table: str

    def lines(self) -> list[str]:
        """Say how many rows were embedded, and where to look for the failed ones."""
        lines = [
            f"{self.mode} embeddings by {self.model_uri} in {self.seconds:,.0f} s",
            f"{plural(self.rows_ok, 'row')} embedded, {self.rows_failed:,} failed, {self.rows_skipped:,} skipped, "
            f"{self.rows_removed:,} removed",
            f"{plural(self.embeddings, 'embedding')} of {plural(self.cells, 'cell')} in {self.output_table}",
            f"the outcome of each row is in {self.ledger_table}",
        ]
        return lines + [f"warning: {kind} ({plural(rows, 'row')})" for kind, rows in self.warnings.items()]


@dataclass(frozen=True, kw_only=True)
class EmbedPlan(CommandResult):
    """What a run would do."""

    mode: str
    model_uri: str
    model_version: str
    rows_in: int
    rows: int
    rows_skipped: int
    rows_removed: int
    cells: int
    waves: int
    partitions: int
    largest_row_cells: int
    worker_memory_mb: int
    seconds_expected: int | None  # at the first measured rate of `capacity`; None: there is none for this session
    output_bytes: int
    capacity: list[Capacity]  # an earlier run of this mode first, then this session's cores, then common GPUs

    def lines(self) -> list[str]:
        """Say how much work is pending and what it takes, here and on other machines."""
        seconds = "unknown" if self.seconds_expected is None else duration(self.seconds_expected)
        lines = [
            f"plan only, nothing is written: {self.mode} embeddings by {self.model_uri}",
            f"{plural(self.rows, 'row')} with {plural(self.cells, 'cell')} of {self.rows_in:,} rows to embed, "
            f"{self.rows_skipped:,} skipped, {self.rows_removed:,} to remove",
            f"{plural(self.waves, 'wave')}, {plural(self.partitions, 'partition')}, "
            f"about {self.worker_memory_mb:,} MB per worker and {size(self.output_bytes)} of output; "
            f"time expected: {seconds}",
            f"{'machine':<16} {'cells/s':>10} {'these cells':>12} {'10 million':>12}  rate",
        ]
        lines += [
            f"{each.compute:<16} {rate(each.cells_per_second):>10} {duration(self.cells / each.cells_per_second):>12} "
            f"{duration(each.hours_per_ten_million_cells * 3600):>12}  {each.source}"
            for each in self.capacity
        ]
        if self.mode != "static":
            lines.append(
                "to save time: --dtype bfloat16 (GPUs, and CPUs with AMX); more cores or GPUs; --mode static, if genes "
                "without context suffice"
            )
        return lines


@dataclass
class Job:
    """One run: its input, model, parameters and output tables."""

    spark: SparkSession
    settings: EmbedSettings
    parameters: Parameters
    model: ResolvedModel
    input: str
    input_snapshot: tables.Snapshot | None  # which the whole run reads; None for a view
    output: str
    ledger: str
    runs: str
    started: datetime
    run_id: str = ""
    package_version: str = scgpt_batch.__version__
    created: set[str] = field(default_factory=set)  # tables that did not exist before
    ledger_commits: int = 0  # that this run has made
    warnings: Counter[str] = field(default_factory=Counter)  # rows by kind of warning
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("rows_in", "rows_ok", "rows_failed", "rows_skipped", "rows_removed", "cells", "embeddings"), 0
        )
    )

    @property
    def stamps(self) -> dict[str, str]:
        """Columns that identify the run's results in every table."""
        return {
            "mode": self.parameters.mode,
            "model_name": self.model.name,
            "model_version": self.model.version,
            "params_hash": self.parameters.params_hash(),
        }

    @property
    def stamped(self) -> str:
        """The stamps as an SQL condition."""
        return " AND ".join(f"{name} = {tables.literal(value)}" for name, value in self.stamps.items())

    @property
    def columns(self) -> str:
        """The columns of the output table (DDL)."""
        return tables.CELL_EMBEDDINGS if self.parameters.mode == "cell" else tables.GENE_EMBEDDINGS

    @property
    def key(self) -> tuple[str, ...]:
        """The columns that identify a line of the output table."""
        return tables.CELL_KEY if self.parameters.mode == "cell" else tables.GENE_KEY

    @property
    def samples(self) -> bool:
        """Whether the results of a sample's rows depend on each other."""
        return rows_depend(self.parameters)

    @property
    def input_version(self) -> int | None:
        """The input's version that the whole run reads; None for a view."""
        return None if self.input_snapshot is None else self.input_snapshot.version

    @property
    def rows(self) -> DataFrame:
        """The input's snapshot."""
        return tables.read(self.spark, self.input, tables.ADATA_ROWS, version=self.input_version)

    @property
    def work(self) -> WorkerTask:
        """The task of the Python workers."""
        model = ModelRef(
            checkpoint=str(self.model.checkpoint),
            digest=self.model.digest,
            uri=self.model.uri,
            tracking_uri=mlflow.get_tracking_uri(),
            registry_uri=mlflow.get_registry_uri(),
        )
        return WorkerTask(model, self.parameters, self.settings.row_timeout)


def embed_table(spark: SparkSession, settings: EmbedSettings, parameters: Parameters) -> EmbedResult | EmbedPlan:
    """Embed the pending rows of a table; with `plan`, only count them.

    Raises
    ------
    ConfigError
        A table, model or parameter is missing or invalid; nothing was written.
    """
    job = _job(spark, settings, parameters)
    if settings.plan:
        return _plan(job)
    require_persist(spark)
    job.package_version = _checked_code(job)
    _create_tables(job)
    if settings.experiment:
        use_experiment(settings.experiment)
    with mlflow.start_run(run_name=f"embed {parameters.mode}") as run:
        job.run_id = run.info.run_id
        try:
            return _run(job)
        except Exception as exc:
            if (wrong := worker_setup_error(exc)) is not None:
                raise wrong from exc
            raise


def _job(spark: SparkSession, settings: EmbedSettings, parameters: Parameters) -> Job:
    model = resolve(settings.model_uri)
    check_model_parameters(parameters, model.config, model.vocabulary)
    input_table, output = tables.table_name(settings.input_table), tables.table_name(settings.output_table)
    tables.read(spark, input_table, tables.ADATA_ROWS)
    snapshot = tables.snapshot(spark, input_table)
    if settings.trigger and snapshot is None:
        raise ConfigError(f"--trigger needs a Delta table, but {input_table} is not one: run without --trigger")
    return Job(
        spark=spark,
        settings=settings,
        parameters=parameters,
        model=model,
        input=input_table,
        input_snapshot=snapshot,
        output=output,
        ledger=tables.table_name(settings.ledger_table or tables.beside(output, "_ledger")),
        runs=tables.table_name(settings.runs_table or tables.beside(output, "_runs")),
        started=datetime.now(UTC),
    )


def _checked_code(job: Job) -> str:
    """Return the package version to stamp, after checking that it reproduces the registered version's answers."""
    differs = code_difference(job.model)
    if differs is None:
        return scgpt_batch.__version__
    difference = (
        f"scgpt_batch {scgpt_batch.__version__} does not reproduce the answers that {job.model.uri} gave when "
        f"scgpt_batch {registered_by(job.model)} registered it: {differs}"
    )
    if not job.settings.allow_other_code:
        raise ConfigError(f"{difference}. Install that version, register the model again, or use --allow-other-code")
    logger.warning("%s; continuing because of --allow-other-code", difference)
    return f"{scgpt_batch.__version__}{OTHER_CODE}"


def _create_tables(job: Job) -> None:
    what = "cell" if job.parameters.mode == "cell" else "gene"
    about = f"scGPT embeddings: a line is the vector of a {what}"
    length = job.model.config.embsize
    _create(job, job.output, job.columns, vector_length=length, comment=about, key="embedding_id")
    if job.settings.search_table:
        search = tables.table_name(job.settings.search_table)
        create_search_table(job.spark, search, job.columns, length)
    _create(job, job.ledger, tables.LEDGER, comment="What became of each row of the scGPT embedding job")
    _create(job, job.runs, tables.RUNS, comment="Runs of the scGPT embedding job", key="run_id")


def _create(job: Job, table: str, columns: str, **options: Any) -> None:
    if tables.create(job.spark, table, columns, **options):
        job.created.add(table)


# --- a run ----------------------------------------------------------------------------------------


def _run(job: Job) -> EmbedResult:
    clock = time.monotonic()
    logger.info("run %s: %s, %s mode, %s -> %s", job.run_id, job.model.uri, job.parameters.mode, job.input, job.output)
    mlflow.log_params(job.parameters.model_dump() | {"model_uri": job.model.uri})
    log_input(job.input, job.input_version)
    earlier = _earlier_runs(job)
    ledger = None if job.ledger in job.created else tables.snapshot(job.spark, job.ledger)
    same = _same_state(job, ledger, earlier)
    if same is None:
        seconds = _embed_changes(job, earlier, ledger.version if ledger else 0, clock)
    else:
        seconds = _end_idle_run(job, same, clock)
    for kind, rows in job.warnings.most_common():
        logger.warning("%d rows have a warning: %s", rows, plain_line(kind))
    mlflow.log_metrics({**job.counts, "seconds": seconds})
    return EmbedResult(
        exit_code=TOO_MANY_FAILED_ROWS if _too_many_failed(job) else OK,
        run_id=job.run_id,
        mode=job.parameters.mode,
        model_uri=job.model.uri,
        model_version=job.model.version,
        **job.counts,
        warnings=dict(job.warnings.most_common()),
        seconds=seconds,
        output_table=job.output,
        ledger_table=job.ledger,
    )


def _too_many_failed(job: Job) -> bool:
    failed = job.counts["rows_failed"]
    computed_rows = job.counts["rows_ok"] + failed
    return computed_rows > 0 and failed / computed_rows > job.settings.max_failed_fraction


def _embed_changes(job: Job, earlier: pd.DataFrame | None, ledger_version: int, clock: float) -> float:
    """Remove the results of rows that are gone, and embed pending rows; return the seconds that the run took."""
    tables.insert(job.spark, job.runs, _begun(job))
    try:
        if job.output not in job.created:
            tables.fill_embedding_ids(job.spark, job.output, job.key)
        _remove_vanished(job, earlier)
        # a stream may have only some rows of a sample and never deleted ones, so samples are read from the table
        if job.settings.trigger and not job.samples:
            _embed_stream(job)
        else:
            _embed_pending(job, job.rows)
        if job.settings.prune:
            current = (job.model.name, job.model.version)
            prune(job.spark, job.output, job.ledger, job.settings.prune, current=current)
        if job.settings.search_table:
            _update_search_table(job)
    except BaseException:  # Ctrl-C too
        _end_failed_run(job, clock)
        raise
    output = _output_snapshot(job)
    line = _ended(job, "finished", clock, output.version)
    if (state := _state_after(job, ledger_version, output)) is not None:
        line["state"] = state
    tables.update(job.spark, job.runs, line, _of_run(job))
    return float(line["seconds"])  # type: ignore[arg-type]


def _end_idle_run(job: Job, same: pd.Series, clock: float) -> float:
    """Record a run that has nothing to do, as the run in `same` left the tables; return the seconds that it took."""
    job.counts["rows_in"] = job.counts["rows_skipped"] = int(same["rows_in"])
    line = _begun(job) | _ended(job, "finished", clock, int(same["output_version"])) | {"state": same["state"]}
    tables.insert(job.spark, job.runs, line)
    return float(line["seconds"])


def _output_snapshot(job: Job) -> tables.Snapshot:
    snapshot = tables.snapshot(job.spark, job.output)
    assert snapshot is not None  # the run has created it as a Delta table
    return snapshot


def _begun(job: Job) -> Line:
    """Return the line of a run that has begun. Later runs see from it that the run is active, or was killed."""
    line: Line = {
        "run_id": job.run_id, "started_at": job.started, "status": "running",
        "mode": job.parameters.mode, "model_uri": job.model.uri, "model_version": job.model.version,
        "params": job.parameters.model_dump_json(), **job.counts,
        "input_table": job.input, "output_table": job.output, "package_version": job.package_version,
    }  # fmt: skip
    if job.input_version is not None:
        line["input_version"] = job.input_version
    return line


def _ended(job: Job, status: str, clock: float, output_version: int) -> Line:
    """Return what completes the run's line."""
    return {
        "status": status, "finished_at": datetime.now(UTC), **job.counts, "seconds": round(time.monotonic() - clock, 3),
        "output_version": output_version,
    }  # fmt: skip


def _of_run(job: Job) -> str:
    return f"run_id = {tables.literal(job.run_id)}"


def _end_failed_run(job: Job, clock: float) -> None:
    """Mark the run as failed, if possible: the cause of the failure (a full disk) may prevent it."""
    try:
        line = _ended(job, "failed", clock, tables.version(job.spark, job.output))
        tables.update(job.spark, job.runs, line, _of_run(job))
    except Exception as exc:  # the first error is the one to report
        logger.warning("cannot mark the run as failed, its line in %s stays 'running': %s", job.runs, in_one_line(exc))


# --- a run with nothing to do ---------------------------------------------------------------------


def _earlier_runs(job: Job) -> pd.DataFrame | None:
    """Return the runs so far over the input and output; None without any."""
    if job.runs in job.created:
        return None
    return earlier_runs(job.spark, job.runs, job.input, job.output)


def _same_state(job: Job, ledger: tables.Snapshot | None, earlier: pd.DataFrame | None) -> pd.Series | None:
    """Return an earlier run that left nothing to do, if nothing has changed since; else None.

    Runs that did not finish may have left embeddings without ledger lines, which only the tables themselves show.
    """
    if ledger is None or earlier is None or earlier["state"].isna().all() or len(unfinished(earlier)):
        return None
    state = _state(job, ledger, _output_snapshot(job))
    same = earlier[(earlier["status"] == "finished") & (earlier["state"] == state)]
    return same.iloc[0] if len(same) else None


def _state(job: Job, ledger: tables.Snapshot, output: tables.Snapshot) -> str | None:
    """Return a hash of all that decides what a run has to do; None if a part of it is not known."""
    settings = job.settings
    if job.input_snapshot is None or settings.retry_failed or settings.trigger or settings.search_table:
        return None
    parts = [
        job.input, str(job.input_snapshot), job.output, str(output), job.ledger, str(ledger), *job.stamps.values(),
        _environment(), str(float(settings.row_timeout)), str(job.parameters.min_coverage), str(settings.prune),
    ]  # fmt: skip
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _state_after(job: Job, version: int, output: tables.Snapshot) -> str | None:
    """Return the state in which the run leaves the tables; None if another run has written to the ledger meanwhile.

    Such a run may have read other contents, and its lines may count for less than those of this run.

    Parameters
    ----------
    version
        The ledger's, before this run looked for pending rows.
    """
    ledger = tables.snapshot(job.spark, job.ledger)
    if ledger is None or ledger.version != version + job.ledger_commits:
        return None
    return _state(job, ledger, output)


def _embed_stream(job: Job) -> None:
    """Embed the rows that a stream over the input finds new since its checkpoint.

    The stream repeats files that an update of the table has rewritten; their rows with a result are skipped.
    """

    if is_remote():
        raise ConfigError(
            "--trigger needs a classic dedicated cluster: Spark Connect, which serverless and shared compute use, "
            "would run its batches on the server. Run without --trigger"
        )

    def embed_batch(batch: DataFrame, _: int) -> None:
        _embed_pending(replace(job, spark=batch.sparkSession), batch)

    stream = tables.read_stream(job.spark, job.input, tables.ADATA_ROWS)
    writer = stream.writeStream.foreachBatch(embed_batch).option("checkpointLocation", job.settings.checkpoint_location)
    writer.trigger(availableNow=True).start().awaitTermination()


def _embed_pending(job: Job, rows: DataFrame) -> None:
    work = _pending(job, rows)
    job.counts["rows_in"] += work.rows_in
    job.counts["rows_skipped"] += work.rows_in - len(work.pending)
    progress = CellProgress(job.spark, int(work.pending["cells"].sum()))
    with progress.shown():
        for number, wave in enumerate(work.waves(job.settings.wave_cells)):
            with progress.wave(int(wave["cells"].sum())):
                _embed_wave(job, rows, _still_pending(job, wave) if number else wave, progress.counter)


def _pending(job: Job, rows: DataFrame, ledger: DataFrame | None = None) -> PendingRows:
    if ledger is None and job.ledger in job.created:
        ledger = _no_lines(job)
    lines = tables.read(job.spark, job.ledger, tables.LEDGER).where(job.stamped) if ledger is None else ledger
    return pending_rows(rows, lines, counts=_counts(job), samples=job.samples, name=job.input)


def _no_lines(job: Job) -> DataFrame:
    return job.spark.createDataFrame([], tables.LEDGER)


def _counts(job: Job) -> Column:
    """Whether a ledger line is a result; the row of another is tried again."""
    if job.settings.retry_failed:
        return F.col("status") == "ok"
    elsewhere = F.col("error_class").isin(*RETRIED_ERRORS) & ~F.col("environment").eqNullSafe(F.lit(_environment()))
    covered = (F.col("genes_matched") > 0) & (F.col("coverage") >= job.parameters.min_coverage)
    longer = (F.col("error_class") == "Timeout") & (F.col("row_timeout") < job.settings.row_timeout)
    outdated = elsewhere | longer | ((F.col("error_class") == "LowCoverage") & covered)
    return (F.col("status") == "ok") | ~F.coalesce(outdated, F.lit(False))


@cache
def _environment() -> str:
    """Return the versions of the package and its libraries, as text for the ledger."""
    return ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)


def _version(package: str) -> str:
    return scgpt_batch.__version__ if package == scgpt_batch.__name__ else installed_version(package)


# --- rows that left the input ---------------------------------------------------------------------


def _remove_vanished(job: Job, earlier: pd.DataFrame | None) -> None:
    gone = _vanished(job, earlier)
    if gone is None:
        return
    gone.remove(job.spark, job.output, job.ledger)
    job.ledger_commits += bool(len(gone.ledger))
    job.counts["rows_removed"] += gone.rows
    if gone.rows:
        logger.info("removed embeddings and ledger lines of %d rows that are no longer in %s", gone.rows, job.input)


def _vanished(job: Job, earlier: pd.DataFrame | None) -> Vanished | None:
    """Return what earlier runs have written for rows that are gone; None without earlier runs."""
    if earlier is None or earlier.empty:
        return None
    return vanished(job.rows, output=job.output, ledger=job.ledger, runs=earlier)


# --- a wave ---------------------------------------------------------------------------------------


def _embed_wave(job: Job, rows: DataFrame, wave: pd.DataFrame, counter: Accumulator | None) -> None:
    """Compute and commit a wave; `counter` gets the cells of finished rows."""
    if wave.empty:
        return
    work, payload = replace(job.work, sums=_summed(job, wave)), _payload(job, rows, wave)

    def answers(isolated: bool) -> DataFrame:
        return payload.mapInArrow(embed_rows(replace(work, isolated=isolated), counter), from_arrow_schema(ANSWERS))

    ledger = computed(
        job.spark,
        answers,
        lambda answers: _commit(job, answers, wave),
        f"a wave of {len(wave)} rows",
    )
    failed = int((ledger["status"] == "failed").sum())
    job.counts["rows_failed"] += failed
    job.counts["rows_ok"] += len(ledger) - failed
    for name in ("cells", "embeddings"):
        job.counts[name] += int(ledger.loc[ledger["status"] == "ok", name].sum())
    for _, line in ledger[ledger["status"] == "failed"].head(5).iterrows():
        shown = [plain_line(str(line[name])) for name in ("adata_id", "error_class", "error_message")]
        logger.warning("row %s failed: %s: %s", *shown)


def _commit(job: Job, answers: DataFrame, wave: pd.DataFrame) -> pd.DataFrame:
    """Commit the embeddings, then the ledger; return the rows' reports."""
    reports: pd.DataFrame = _reports(answers).toPandas()
    members = _members(job, wave, reports)
    lines = answers.where("report IS NULL")
    if job.parameters.mode == "contextual" and len(members):
        lines = _keyed_by_sample(job, lines, members, summed=_summed(job, wave))
    tables.replace(_embeddings(job, lines), job.output, lambda: _replaceable(job, wave))
    tables.replace(_ledger_lines(job, _reports(answers), members), job.ledger, lambda: _replaceable(job, wave))
    job.ledger_commits += 1
    warnings = [*reports["warnings"], *([warning] for warning in members.get("warning", []) if warning)]
    job.warnings.update(warning_kind(warning) for of_row in warnings for warning in of_row)
    return reports


def _concurrent_runs(job: Job) -> list[str]:
    """Return the runs that may have embeddings without ledger lines, or ledger lines that this run has not read.

    These are killed, failed, concurrent and recently finished runs, and this run itself.
    """
    runs = job.spark.table(job.runs).where(F.col("output_table") == job.output)
    since = F.lit(job.started.date() - timedelta(days=CONCURRENT_DAYS))  # a time would be compiled in each run
    open_runs = runs.where((F.col("status") != "finished") | (F.col("finished_at") > since))
    return [row["run_id"] for row in open_runs.select("run_id").collect()]


def _still_pending(job: Job, wave: pd.DataFrame) -> pd.DataFrame:
    """Leave out rows that a concurrent run has embedded since this run read the ledger."""
    others = [run for run in _concurrent_runs(job) if run != job.run_id]
    if not others or wave["sample_id"].notna().any():  # a sample is embedded as a whole
        return wave
    lines = job.spark.table(job.ledger).where(job.stamped).where(F.col("run_id").isin(others))
    lines = lines.where(F.col("at") > F.lit(job.started)).select("adata_id", "content_hash").toPandas()
    done = wave.merge(lines.dropna(), on=["adata_id", "content_hash"])["adata_id"]
    job.counts["rows_skipped"] += len(done)
    return wave[~wave["adata_id"].isin(done)]


def _replaceable(job: Job, wave: pd.DataFrame) -> str:
    """Return the condition of the lines that the wave's embeddings replace; the embeddings meet it themselves.

    New keys can have lines of concurrent runs only; naming these runs lets Delta skip all other files. The condition
    is evaluated again for each try to commit, because further runs may have started.
    """
    shared = set(wave["sample_id"].dropna()) if job.parameters.mode == "contextual" else set()
    ids = ", ".join(map(tables.literal, {*wave["adata_id"], *shared}))
    condition = f"{job.stamped} AND adata_id IN ({ids})"
    if wave["known"].any() or shared:  # lines of a sample may come from rows that it no longer has
        return condition
    return f"{condition} AND run_id IN ({', '.join(map(tables.literal, _concurrent_runs(job)))})"


def _payload(job: Job, rows: DataFrame, wave: pd.DataFrame) -> DataFrame:
    """Return the wave's rows with their payload, distributed over the tasks."""
    rows = rows.where(key_range_filter(wave))
    if job.parameters.mode == "static" and (wave["copies"] == 1).all() and not _samples(wave):
        # a row takes about 25 ms: a shuffle of the payload would take longer
        chosen = rows.join(F.broadcast(job.spark.createDataFrame(wave[["adata_id"]])), "adata_id")
    else:
        chosen = rows.join(F.broadcast(with_tasks(job.spark, wave)), "adata_id").repartition(n_tasks(wave), "task")
        if (wave["copies"] > 1).any():
            chosen = chosen.dropDuplicates(["adata_id"])
    if _samples(wave) and job.parameters.need_preprocess:
        decided = decisions(chosen, job.work)
        chosen = chosen.join(F.broadcast(decided), "sample_id")
    else:
        chosen = chosen.withColumn("decisions", F.lit(None).cast("binary"))
    return chosen.withColumn("content_hash", tables.row_hash()).select(*PAYLOAD)


def _samples(wave: pd.DataFrame) -> set[str]:
    """Return the wave's samples with several rows; either all of its rows belong to such samples, or none."""
    return set(wave["sample"].dropna())


def _summed(job: Job, wave: pd.DataFrame) -> bool:
    """Return whether rows yield sums, from which the means of their sample are computed."""
    return job.parameters.mode == "contextual" and bool(_samples(wave))


def _members(job: Job, wave: pd.DataFrame, reports: pd.DataFrame) -> pd.DataFrame:
    """Return the wave's rows that belong to samples: adata_id, sample_id, sample_hash and warning (or None).

    The hash covers the contents that were read, which in a view can be newer than those that were planned.
    """
    contents = reports[["adata_id", "content_hash", "status"]]
    members = wave.loc[wave["sample_id"].notna(), ["adata_id", "sample_id"]].merge(contents, on="adata_id")
    warnings = {}
    for sample, rows in members.groupby("sample_id"):
        members.loc[rows.index, "sample_hash"] = sample_hash(str(sample), rows["content_hash"])
        failed = int((rows["status"] == "failed").sum())
        if failed and job.parameters.mode == "contextual":
            warnings[sample] = f"{failed} of {len(rows)} rows of the sample failed: its means leave them out"
    members["warning"] = [
        warnings.get(sample) if status == "ok" else None
        for sample, status in zip(members["sample_id"], members["status"], strict=True)
    ]
    return members[["adata_id", "sample_id", "sample_hash", "warning"]] if len(members) else members


def _of_members(job: Job, members: pd.DataFrame) -> DataFrame:
    lines = list(members.itertuples(index=False, name=None))
    schema = "adata_id STRING, sample_id STRING, sample_hash STRING, warning STRING"
    return F.broadcast(job.spark.createDataFrame(lines, schema))


def _keyed_by_sample(job: Job, lines: DataFrame, members: pd.DataFrame, *, summed: bool) -> DataFrame:
    """Return contextual lines keyed by sample; sums of several rows become means over all cells."""
    keyed = lines.drop("content_hash") if summed else lines
    keyed = keyed.join(_of_members(job, members).drop("warning"), "adata_id", "inner" if summed else "left")
    if summed:
        hashes = _of_members(job, members.drop_duplicates("sample_id")).select("sample_id", "sample_hash")
        averaged = means(keyed).join(hashes.withColumnRenamed("sample_hash", "content_hash"), "sample_id")
        return averaged.withColumnRenamed("sample_id", "adata_id")
    return keyed.withColumn("adata_id", F.coalesce("sample_id", "adata_id"))


def _embeddings(job: Job, lines: DataFrame) -> DataFrame:
    """Return the lines of the output table; in static mode, each gene's vector is joined from the vocabulary's."""
    if job.parameters.mode == "cell":
        columns, order = ["adata_id", "cell_id", "embedding"], ["adata_id", "cell_id"]
    else:
        columns, order = ["adata_id", "group", "gene", "embedding", "n_cells"], ["gene", "adata_id"]
    if job.parameters.mode == "static":
        lines = _with_static_vectors(job, lines, order)
    else:
        lines = lines.sortWithinPartitions(*order)
    return _as_in_table(job, _as_embeddings(job, lines.select(*columns, "content_hash")), job.output)


def _as_embeddings(job: Job, lines: DataFrame) -> DataFrame:
    """Add the stamps of embeddings, and their key in one column."""
    stamps = _stamps(job) | {"embedded_at": F.current_timestamp(), "package_version": F.lit(job.package_version)}
    return lines.withColumns(stamps).withColumn("embedding_id", F.expr(tables.embedding_id(job.key)))


def _as_in_table(job: Job, lines: DataFrame, table: str) -> DataFrame:
    return lines.select(*(field.name for field in job.spark.table(table).schema if field.name in lines.columns))


def _with_static_vectors(job: Job, lines: DataFrame, order: Sequence[str]) -> DataFrame:
    """Join each gene's vector, which is computed once per wave.

    Lines are sorted before the join, while they are small. A merge join by gene keeps the order, so equal vectors are
    adjacent and compress to almost nothing.
    """
    vectors = _static_vectors(job, lines)
    ordered = lines.drop("embedding").repartition("gene").sortWithinPartitions(*order)
    return ordered.hint("merge").join(vectors.hint("merge"), "gene")


def _static_vectors(job: Job, lines: DataFrame) -> DataFrame:
    """Return the vector of each gene of `lines`."""
    genes = lines.select("gene").distinct()
    return genes.mapInArrow(static_vectors(job.work.model), from_arrow_schema(VECTORS))


def _reports(answers: DataFrame) -> DataFrame:
    return answers.where("report IS NOT NULL").select("adata_id", "content_hash", "report.*")


def _ledger_lines(job: Job, reports: DataFrame, members: pd.DataFrame) -> DataFrame:
    """Return the ledger lines, in one partition: each row's report, with its sample and the sample's warning."""
    if len(members):
        reports = reports.join(_of_members(job, members), "adata_id", "left")
        warnings = F.when(F.isnull("warning"), F.col("warnings")).otherwise(F.concat("warnings", F.array("warning")))
        reports = reports.withColumn("warnings", warnings)
    stamps = _stamps(job) | {
        "at": F.current_timestamp(),
        "environment": F.lit(_environment()),
        "row_timeout": F.lit(float(job.settings.row_timeout)),
    }
    return _as_in_table(job, reports.withColumns(stamps), job.ledger).repartition(1)


def _stamps(job: Job) -> dict[str, Column]:
    return {name: F.lit(value) for name, value in {**job.stamps, "run_id": job.run_id}.items()}


# --- the search table -----------------------------------------------------------------------------


def _update_search_table(job: Job) -> None:
    """Bring the search table to the lines of this model version and these parameters.

    In static mode a gene has the same vector in every row, so it gets one line, without a row.
    """
    table = tables.table_name(job.settings.search_table)
    lines = job.spark.table(job.output).where(job.stamped).select(*job.spark.table(table).columns)
    if job.parameters.mode == "static":
        of_no_row = {name: F.lit(None).cast("string") for name in ("adata_id", "group", "content_hash")}
        genes = _as_embeddings(job, lines.select("gene").distinct().withColumns(of_no_row))
        update_search_table(
            job.spark, table, genes, lambda some: some.join(_static_vectors(job, some), "gene"), same=["embedding_id"]
        )
        return
    of_lines = lines.select("embedding_id", "embedding")
    update_search_table(
        job.spark,
        table,
        lines.drop("embedding"),
        lambda some: some.join(of_lines, "embedding_id"),
        same=["embedding_id", "run_id"],
    )


# --- plan ----------------------------------------------------------------------------


def _plan(job: Job) -> EmbedPlan:
    """Return what a run would do and how long it would take; write nothing."""
    first = not all(tables.exists(job.spark, table) for table in (job.output, job.ledger, job.runs))
    work = _pending(job, job.rows, _no_lines(job) if first else None)
    waves = list(work.waves(job.settings.wave_cells))
    cells = int(work.pending["cells"].sum())
    machines = [*_of_last_run(job), *capacities(job.parameters, job.model.config, _cores(job.spark))]
    here = next((each for each in machines if each.source != CALCULATED), None)
    gone = None if first else _vanished(job, _earlier_runs(job))
    return EmbedPlan(
        mode=job.parameters.mode,
        model_uri=job.model.uri,
        model_version=job.model.version,
        rows_in=work.rows_in,
        rows=len(work.pending),
        rows_skipped=work.rows_in - len(work.pending),
        rows_removed=gone.rows if gone else 0,
        cells=cells,
        waves=len(waves),
        partitions=sum(map(n_tasks, waves)),
        largest_row_cells=int(work.pending["cells"].max()) if cells else 0,
        worker_memory_mb=_worker_memory(job, work),
        seconds_expected=round(cells / here.cells_per_second) if here else None,
        output_bytes=output_bytes(job.parameters, job.model.config.embsize, rows=len(work.pending), cells=cells),
        capacity=machines,
    )


def _of_last_run(job: Job) -> Iterator[Capacity]:
    """Yield the rate of the last run of this mode that spent most of its time on cells."""
    if not tables.exists(job.spark, job.runs):
        return
    runs = job.spark.table(job.runs).where(f"status = 'finished' AND cells >= {CELLS_TO_TELL}")
    last = runs.where(F.col("mode") == job.parameters.mode).orderBy(F.desc("started_at")).first()
    if last:
        yield capacity("as last run", last["cells"] / last["seconds"], f"{MEASURED} by run {last['run_id']}")


def _cores(spark: SparkSession) -> int | None:
    """Return the number of tasks that run at once on CPU cores; None for GPUs, and under Spark Connect."""
    if is_remote() or spark.conf.get("spark.task.resource.gpu.amount", None):
        return None
    return spark.sparkContext.defaultParallelism


def _worker_memory(job: Job, work: PendingRows) -> int:
    """Estimate the memory of a Python worker in MB (10⁶ bytes): libraries, weights, a batch, rows read ahead."""
    weights = sum(file.stat().st_size for file in job.model.checkpoint.iterdir()) / 1e6
    largest = int(work.pending["cells"].max()) if len(work.pending) else 0
    return round(LIBRARIES_MB + 2 * weights + ROW_MB_PER_1000_CELLS * largest / 1000)

"""The main job: rows of AnnData in Delta -> registered model -> embeddings, ledger and runs in Delta.

Rows that have a result for this content, model version and parameters are skipped. The rest goes in waves of bounded
size; of each wave the embeddings are committed first, then the ledger lines that tell of them. A run that is killed
anywhere leaves at most one wave of embeddings without ledger lines: the next run, for which these rows are missing,
writes them in place of what it finds.

Rows of one `sample_id` share preprocessing decisions, and contextual mode averages over all of their cells: its lines
then carry the sample's id as adata_id, while each row keeps its line in the ledger. A run first removes what the tables
hold of rows and samples that the input no longer has.
"""

import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.metadata import version as installed_version

import mlflow
import pandas as pd
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.utils import is_remote

import scgpt_batch
from scgpt_batch.errors import ConfigError, in_one_line, plain_line
from scgpt_batch.inference.engine import check_model_parameters
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.sample_statistics import rows_depend
from scgpt_batch.registry.register import use_experiment
from scgpt_batch.registry.resolve import ResolvedModel, resolve
from scgpt_batch.registry.sample_answers import code_difference, registered_by
from scgpt_batch.settings import EmbedSettings, Summary
from scgpt_batch.spark import tables
from scgpt_batch.spark.maintain import prune
from scgpt_batch.spark.pending import PendingRows, key_range_filter, n_tasks, pending_rows, sample_hash, with_tasks
from scgpt_batch.spark.sample_decisions import decisions, means
from scgpt_batch.spark.vanished import Vanished, vanished
from scgpt_batch.spark.worker import ANSWERS, VECTORS, ModelRef, WorkerTask, embed_rows, static_vectors
from scgpt_batch.spark.workers import computed, worker_setup_error

logger = logging.getLogger(__name__)

LIBRARIES_MB, ROW_MB_PER_1000_CELLS = 900, 120  # of a worker: torch and scanpy; a row of 2,000 genes a cell, measured
RIVAL_DAYS = 2  # from midnight, so a day or more in any time zone: as long a run may be unknown to one beside it

PAYLOAD = (
    "adata_id", "sample_id", "content_hash", "adata_sparsematrix", "x_data", "x_indices", "x_indptr", "n_obs", "n_vars",
    "adata_obs", "adata_var", "x_dtype", "decisions",
)  # fmt: skip
# Whose version may be why a row failed as one of `NOT_THE_ROWS`: it is tried again with another.
LIBRARIES = ("scgpt_batch", "anndata", "numpy", "pandas", "pyarrow", "scanpy", "scipy", "torch")
OTHER_CODE = "+other-code"  # behind the package version of what --allow-other-code let through
NOT_THE_ROWS = ("InternalError", "WorkerCrash", "Timeout")
_NAMES, _NUMBERS = re.compile(r"'[^']*'|\"[^\"]*\""), re.compile(r"\b\d[\d.,]*\d\b|\b\d\b")


@dataclass
class Job:
    """One run: what it reads, with what, and where it writes."""

    spark: SparkSession
    settings: EmbedSettings
    parameters: Parameters
    model: ResolvedModel
    input: str
    input_version: int | None  # the whole run reads this snapshot; None of a view
    output: str
    ledger: str
    runs: str
    started: datetime
    run_id: str = ""
    package_version: str = scgpt_batch.__version__
    warnings: Counter[str] = field(default_factory=Counter)  # rows by kind of warning
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("rows_in", "rows_ok", "rows_failed", "rows_skipped", "rows_removed", "cells", "embeddings"), 0
        )
    )

    @property
    def stamps(self) -> dict[str, str]:
        """What identifies the run's results in every table."""
        return {
            "mode": self.parameters.mode,
            "model_name": self.model.name,
            "model_version": self.model.version,
            "params_hash": self.parameters.params_hash(),
        }

    @property
    def stamped(self) -> str:
        """The stamps as a condition."""
        return " AND ".join(f"{name} = {tables.literal(value)}" for name, value in self.stamps.items())

    @property
    def samples(self) -> bool:
        """Whether the rows of a sample depend on each other."""
        return rows_depend(self.parameters)

    @property
    def rows(self) -> DataFrame:
        """The input's snapshot."""
        return tables.read(self.spark, self.input, tables.ADATA_ROWS, version=self.input_version)

    @property
    def work(self) -> WorkerTask:
        """What the workers do with each row."""
        model = ModelRef(
            checkpoint=str(self.model.checkpoint),
            digest=self.model.digest,
            uri=self.model.uri,
            tracking_uri=mlflow.get_tracking_uri(),
            registry_uri=mlflow.get_registry_uri(),
        )
        return WorkerTask(model, self.parameters, self.settings.row_timeout)


def embed_table(spark: SparkSession, settings: EmbedSettings, parameters: Parameters) -> Summary:
    """Embed the rows of a table that have no result yet; return the summary.

    Raises
    ------
    ConfigError
        A table, model or parameter is missing or wrong; nothing was written.
    """
    job = _job(spark, settings, parameters)
    if settings.plan:
        return _plan(job)
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
    version = tables.snapshot(spark, input_table)
    if settings.trigger and version is None:
        raise ConfigError(f"--trigger needs a Delta table, {input_table} is not one: leave --trigger out")
    return Job(
        spark=spark,
        settings=settings,
        parameters=parameters,
        model=model,
        input=input_table,
        input_version=version,
        output=output,
        ledger=tables.table_name(settings.ledger_table or tables.beside(output, "_ledger")),
        runs=tables.table_name(settings.runs_table or tables.beside(output, "_runs")),
        started=datetime.now(UTC),
    )


def _checked_code(job: Job) -> str:
    """Return the version of the package to stamp, after a look whether it gives the registered version's numbers."""
    differs = code_difference(job.model)
    if differs is None:
        return scgpt_batch.__version__
    told = (
        f"scgpt_batch {scgpt_batch.__version__} does not answer as {job.model.uri} did when scgpt_batch "
        f"{registered_by(job.model)} registered it: {differs}"
    )
    if not job.settings.allow_other_code:
        raise ConfigError(f"{told}. Install that version, register the model again, or use --allow-other-code")
    logger.warning("%s; --allow-other-code lets the run go on", told)
    return f"{scgpt_batch.__version__}{OTHER_CODE}"


def _create_tables(job: Job) -> None:
    columns = tables.CELL_EMBEDDINGS if job.parameters.mode == "cell" else tables.GENE_EMBEDDINGS
    tables.create(job.spark, job.output, columns, vector_length=job.model.config.embsize)
    tables.create(job.spark, job.ledger, tables.LEDGER)
    tables.create(job.spark, job.runs, tables.RUNS)


# --- a run ----------------------------------------------------------------------------------------


def _run(job: Job) -> Summary:
    clock = time.monotonic()
    logger.info("run %s: %s, %s mode, %s -> %s", job.run_id, job.model.uri, job.parameters.mode, job.input, job.output)
    mlflow.log_params(job.parameters.model_dump() | {"model_uri": job.model.uri})
    _begin_run(job)
    try:
        _remove_vanished(job)
        # a stream shows a part of a sample, or of what was deleted from it, nothing: samples are looked up in the table
        if job.settings.trigger and not job.samples:
            _embed_stream(job, clock)
        else:
            _embed_missing(job, job.rows, clock)
        if job.settings.prune:
            prune(job.spark, job.output, job.ledger, job.settings.prune)
    except BaseException:  # Ctrl-C too
        _end_failed_run(job, clock)
        raise
    seconds = _end_run(job, "finished", clock)
    for kind, rows in job.warnings.most_common():
        logger.warning("%d rows carry a warning: %s", rows, plain_line(kind))
    mlflow.log_metrics({**job.counts, "seconds": seconds})
    return {
        "run_id": job.run_id,
        "mode": job.parameters.mode,
        "model_uri": job.model.uri,
        "model_version": job.model.version,
        **job.counts,
        "warnings": dict(job.warnings.most_common()),
        "seconds": seconds,
        "output_table": job.output,
        "ledger_table": job.ledger,
    }


def _begin_run(job: Job) -> None:
    """Say that the run is at work: what it leaves, should it be killed, is a rival's from now on."""
    told: dict[str, str | float | datetime] = {
        "run_id": job.run_id, "started_at": job.started, "status": "running",
        "mode": job.parameters.mode, "model_uri": job.model.uri, "model_version": job.model.version,
        "params": job.parameters.model_dump_json(), **job.counts,
        "input_table": job.input, "output_table": job.output, "package_version": job.package_version,
    }  # fmt: skip
    if job.input_version is not None:
        told["input_version"] = job.input_version
    tables.insert(job.spark, job.runs, told)


def _end_run(job: Job, status: str, clock: float) -> float:
    """Complete the run's line; return how long the run took."""
    seconds = round(time.monotonic() - clock, 3)
    told: dict[str, str | float | datetime] = {
        "status": status, "finished_at": datetime.now(UTC), **job.counts, "seconds": seconds,
        "output_version": tables.version(job.spark, job.output),
    }  # fmt: skip
    tables.update(job.spark, job.runs, told, f"run_id = {tables.literal(job.run_id)}")
    return seconds


def _end_failed_run(job: Job, clock: float) -> None:
    """Say that the run failed, where that can be written: what stopped the run (a full disk) may stop this too."""
    try:
        _end_run(job, "failed", clock)
    except Exception as exc:  # the first error is the one to tell
        logger.warning("the run's line in %s stays 'running': %s", job.runs, in_one_line(exc))


def _embed_stream(job: Job, clock: float) -> None:
    """Take what the stream over the input finds new; its checkpoint remembers what it has seen.

    Files that an update of the table has rewritten come again: rows with a result are skipped, as in any run.
    """

    if is_remote():
        raise ConfigError("--trigger needs a classic Spark session: Spark Connect would run its batches on the server")

    def take(batch: DataFrame, _: int) -> None:
        _embed_missing(replace(job, spark=batch.sparkSession), batch, clock)

    stream = tables.read_stream(job.spark, job.input, tables.ADATA_ROWS)
    writer = stream.writeStream.foreachBatch(take).option("checkpointLocation", job.settings.checkpoint_location)
    writer.trigger(availableNow=True).start().awaitTermination()


def _embed_missing(job: Job, rows: DataFrame, clock: float) -> None:
    missing = _missing(job, rows)
    job.counts["rows_in"] += missing.rows_in
    job.counts["rows_skipped"] += missing.rows_in - len(missing.pending)
    cells, done = int(missing.pending["cells"].sum()), 0
    for number, wave in enumerate(missing.waves(job.settings.wave_cells)):
        _embed_wave(job, rows, _still_missing(job, wave) if number else wave)
        done += int(wave["cells"].sum())
        _show_progress(job, len(missing.pending), done, cells, time.monotonic() - clock)


def _missing(job: Job, rows: DataFrame, ledger: DataFrame | None = None) -> PendingRows:
    lines = tables.read(job.spark, job.ledger, tables.LEDGER).where(job.stamped) if ledger is None else ledger
    return pending_rows(rows, lines, counts=_counts(job), samples=job.samples, name=job.input)


def _counts(job: Job) -> Column:
    """Whether a ledger line is a result; the row of another is tried again."""
    if job.settings.retry_failed:
        return F.col("status") == "ok"
    elsewhere = F.col("error_class").isin(*NOT_THE_ROWS) & ~F.col("environment").eqNullSafe(F.lit(_environment()))
    covered = (F.col("genes_matched") > 0) & (F.col("coverage") >= job.parameters.min_coverage)
    longer = (F.col("error_class") == "Timeout") & (F.col("row_timeout") < job.settings.row_timeout)
    outdated = elsewhere | longer | ((F.col("error_class") == "LowCoverage") & covered)
    return (F.col("status") == "ok") | ~F.coalesce(outdated, F.lit(False))


@cache
def _environment() -> str:
    """Name the versions of the package and its libraries here."""
    held = {name: _version(name) for name in LIBRARIES}
    return ", ".join(f"{name} {version}" for name, version in held.items())


def _version(package: str) -> str:
    return scgpt_batch.__version__ if package == scgpt_batch.__name__ else installed_version(package)


# --- what the input no longer has -----------------------------------------------------------------


def _remove_vanished(job: Job) -> None:
    gone = _vanished(job)
    gone.remove(job.spark, job.output, job.ledger)
    job.counts["rows_removed"] += gone.rows
    if gone.rows:
        logger.info("%d rows are no longer in %s: their embeddings and ledger lines are removed", gone.rows, job.input)


def _vanished(job: Job) -> Vanished:
    held = {"output": job.output, "ledger": job.ledger, "runs": job.runs}
    return vanished(job.rows, job.input, run_id=job.run_id, **held)


# --- a wave ---------------------------------------------------------------------------------------


def _embed_wave(job: Job, rows: DataFrame, wave: pd.DataFrame) -> None:
    """Compute and commit a wave."""
    if wave.empty:
        return
    work, payload = replace(job.work, sums=_summed(job, wave)), _payload(job, rows, wave)
    ledger = computed(
        job.spark,
        lambda isolated: payload.mapInArrow(embed_rows(replace(work, isolated=isolated)), from_arrow_schema(ANSWERS)),
        lambda answers: _commit(job, answers, wave),
        f"a wave of {len(wave)} rows",
    )
    failed = int((ledger["status"] == "failed").sum())
    job.counts["rows_failed"] += failed
    job.counts["rows_ok"] += len(ledger) - failed
    for name in ("cells", "embeddings"):
        job.counts[name] += int(ledger.loc[ledger["status"] == "ok", name].sum())
    for _, line in ledger[ledger["status"] == "failed"].head(5).iterrows():
        told = [plain_line(str(line[name])) for name in ("adata_id", "error_class", "error_message")]
        logger.warning("row %s failed: %s: %s", *told)


def _commit(job: Job, answers: DataFrame, wave: pd.DataFrame) -> pd.DataFrame:
    """Commit the embeddings, then the ledger; return the rows' reports."""
    reports: pd.DataFrame = _reports(answers).toPandas()
    members = _members(job, wave, reports)
    lines = answers.where("report IS NULL")
    if job.parameters.mode == "contextual" and len(members):
        lines = _keyed_by_sample(job, lines, members, summed=_summed(job, wave))
    tables.replace(_embeddings(job, lines), job.output, lambda: _replaceable(job, wave))
    tables.replace(_ledger_lines(job, _reports(answers), members), job.ledger, lambda: _replaceable(job, wave))
    warnings = [*reports["warnings"], *([told] for told in members.get("warning", []) if told)]
    job.warnings.update(warning_kind(told) for of_row in warnings for told in of_row)
    return reports


def _concurrent_runs(job: Job) -> list[str]:
    """The runs that may have embeddings without ledger lines, or lines we have not seen.

    That is: killed or failed ones, those at work beside this one, those that have just ended, and this one itself.
    """
    runs = job.spark.table(job.runs).where(F.col("output_table") == job.output)
    since = F.lit(job.started.date() - timedelta(days=RIVAL_DAYS))  # a time would be compiled anew in each run
    open_runs = runs.where((F.col("status") != "finished") | (F.col("finished_at") > since))
    return [row["run_id"] for row in open_runs.select("run_id").collect()]


def _still_missing(job: Job, wave: pd.DataFrame) -> pd.DataFrame:
    """Leave out what a run beside this one has done since we looked."""
    others = [run for run in _concurrent_runs(job) if run != job.run_id]
    if not others or wave["sample_id"].notna().any():  # a sample is done as a whole
        return wave
    lines = job.spark.table(job.ledger).where(job.stamped).where(F.col("run_id").isin(others))
    lines = lines.where(F.col("at") > F.lit(job.started)).select("adata_id", "content_hash").toPandas()
    done = wave.merge(lines.dropna(), on=["adata_id", "content_hash"])["adata_id"]
    job.counts["rows_skipped"] += len(done)
    return wave[~wave["adata_id"].isin(done)]


def _replaceable(job: Job, wave: pd.DataFrame) -> str:
    """What the wave's embeddings are written in place of: the condition that they meet themselves.

    A key that is new can have lines of rivals alone; naming these lets Delta pass over all other files. Ask at each
    try to commit: a run that has begun since is a rival too.
    """
    shared = set(wave["sample_id"].dropna()) if job.parameters.mode == "contextual" else set()
    ids = ", ".join(map(tables.literal, {*wave["adata_id"], *shared}))
    condition = f"{job.stamped} AND adata_id IN ({ids})"
    if wave["known"].any() or shared:  # a sample's lines may be of rows that it no longer has
        return condition
    return f"{condition} AND run_id IN ({', '.join(map(tables.literal, _concurrent_runs(job)))})"


def _payload(job: Job, rows: DataFrame, wave: pd.DataFrame) -> DataFrame:
    """Give each task its share of the wave's rows."""
    rows = rows.where(key_range_filter(wave))
    if job.parameters.mode == "static" and (wave["copies"] == 1).all() and not _samples(wave):
        # some 25 ms a row: moving the payload between tasks would cost more
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
    """The wave's samples of several rows: all its rows belong to such, or none."""
    return set(wave["sample"].dropna())


def _summed(job: Job, wave: pd.DataFrame) -> bool:
    """Whether rows answer with sums, of which a sample's means are made."""
    return job.parameters.mode == "contextual" and bool(_samples(wave))


def _members(job: Job, wave: pd.DataFrame, reports: pd.DataFrame) -> pd.DataFrame:
    """The wave's rows that belong to samples: adata_id, sample_id, sample_hash, and warning (None where all is well).

    The hash is over the contents that were read, which of a view may be newer than those that were planned.
    """
    told = reports[["adata_id", "content_hash", "status"]]
    members = wave.loc[wave["sample_id"].notna(), ["adata_id", "sample_id"]].merge(told, on="adata_id")
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
    """Give contextual lines their sample's id as adata_id; sums of several rows become means over all cells."""
    keyed = lines.drop("content_hash") if summed else lines
    keyed = keyed.join(_of_members(job, members).drop("warning"), "adata_id", "inner" if summed else "left")
    if summed:
        hashes = _of_members(job, members.drop_duplicates("sample_id")).select("sample_id", "sample_hash")
        averaged = means(keyed).join(hashes.withColumnRenamed("sample_hash", "content_hash"), "sample_id")
        return averaged.withColumnRenamed("sample_id", "adata_id")
    return keyed.withColumn("adata_id", F.coalesce("sample_id", "adata_id"))


def _embeddings(job: Job, lines: DataFrame) -> DataFrame:
    """Lines of the output table; in static mode each gene's vector is joined from one table of the vocabulary."""
    if job.parameters.mode == "cell":
        columns, order = ["adata_id", "cell_id", "embedding"], ["adata_id", "cell_id"]
    else:
        columns, order = ["adata_id", "group", "gene", "embedding", "n_cells"], ["gene", "adata_id"]
    if job.parameters.mode == "static":
        lines = _with_static_vectors(job, lines, order)
    else:
        lines = lines.sortWithinPartitions(*order)
    stamps = _stamps(job) | {"embedded_at": F.current_timestamp(), "package_version": F.lit(job.package_version)}
    return _as_in_table(job, lines.select(*columns, "content_hash").withColumns(stamps), job.output)


def _as_in_table(job: Job, lines: DataFrame, table: str) -> DataFrame:
    return lines.select(*(field.name for field in job.spark.table(table).schema if field.name in lines.columns))


def _with_static_vectors(job: Job, lines: DataFrame, order: Sequence[str]) -> DataFrame:
    """Join each gene's vector, computed once a wave.

    Lines are put in order while they are small. A merge join by gene keeps it, so equal vectors lie side by side and
    compress to nothing.
    """
    vectors = lines.select("gene").distinct().mapInArrow(static_vectors(job.work.model), from_arrow_schema(VECTORS))
    ordered = lines.drop("embedding").repartition("gene").sortWithinPartitions(*order)
    return ordered.hint("merge").join(vectors.hint("merge"), "gene")


def _reports(answers: DataFrame) -> DataFrame:
    return answers.where("report IS NOT NULL").select("adata_id", "content_hash", "report.*")


def _ledger_lines(job: Job, reports: DataFrame, members: pd.DataFrame) -> DataFrame:
    """Lines of the ledger: each row's report, with its sample and what that says of it; in one file."""
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


def warning_kind(warning: str) -> str:
    """Return what a warning has in common with its like in other rows: its first clause, names and numbers left out."""
    clause = re.split(r"[:;(]", _NAMES.sub("…", warning), maxsplit=1)[0]
    return _NUMBERS.sub("N", clause).strip()


# --- what a person sees ---------------------------------------------------------------------------


def _plan(job: Job) -> Summary:
    """Say what a run would do, and how long it took per cell before; write nothing."""
    first = not all(tables.exists(job.spark, table) for table in (job.output, job.ledger, job.runs))
    ledger = job.spark.createDataFrame([], tables.LEDGER) if first else None
    missing = _missing(job, job.rows, ledger)
    waves = list(missing.waves(job.settings.wave_cells))
    cells = int(missing.pending["cells"].sum())
    rate = _cells_per_second(job)
    return {
        "mode": job.parameters.mode,
        "model_uri": job.model.uri,
        "model_version": job.model.version,
        "rows_in": missing.rows_in,
        "rows": len(missing.pending),
        "rows_skipped": missing.rows_in - len(missing.pending),
        "rows_removed": 0 if first else _vanished(job).rows,
        "cells": cells,
        "waves": len(waves),
        "partitions": sum(map(n_tasks, waves)),
        "largest_row_cells": int(missing.pending["cells"].max()) if cells else 0,
        "worker_memory_mb": _worker_memory(job, missing),
        "seconds_expected": round(cells / rate) if rate else None,  # None: no earlier run to judge by
    }


def _cells_per_second(job: Job) -> float | None:
    """The rate of the last run of this mode that finished, from the table of runs."""
    if not tables.exists(job.spark, job.runs):
        return None
    runs = job.spark.table(job.runs).where("status = 'finished' AND cells > 0 AND seconds > 0")
    last = runs.where(F.col("mode") == job.parameters.mode).orderBy(F.desc("started_at")).first()
    return last["cells"] / last["seconds"] if last else None


def _worker_memory(job: Job, missing: PendingRows) -> int:
    """MB (10⁶ bytes) of a Python worker, roughly: libraries, weights, a batch, and the largest rows read ahead."""
    weights = sum(file.stat().st_size for file in job.model.checkpoint.iterdir()) / 1e6
    largest = int(missing.pending["cells"].max()) if len(missing.pending) else 0
    return round(LIBRARIES_MB + 2 * weights + ROW_MB_PER_1000_CELLS * largest / 1000)


def _show_progress(job: Job, rows: int, cells_done: int, cells: int, seconds: float) -> None:
    if not sys.stderr.isatty():
        return
    done = job.counts["rows_ok"] + job.counts["rows_failed"]
    rate = cells_done / seconds
    left = (cells - cells_done) / rate if rate else 0
    line = f"{done} of {rows} rows, {rate:,.0f} cells/s, about {left:,.0f} s left"
    print(f"\r{line:<70}", end="" if done < rows else "\n", file=sys.stderr, flush=True)

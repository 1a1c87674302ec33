"""The main job: rows of AnnData in Delta -> registered model -> embeddings, ledger and runs in Delta.

Rows that already have a result for their content, model version and parameters are skipped. The pending rows are
processed in waves of bounded size. Each wave commits its embeddings first, then its ledger lines. A killed run leaves
at most one wave of embeddings without ledger lines: for the next run these rows are pending, and it replaces them.

Rows with the same `sample_id` share preprocessing decisions, and contextual mode averages over all their cells: the
embeddings then have the sample's id as adata_id, while the ledger has one line per row. Each run first removes the
results of rows and samples that are no longer in the input.
"""

import logging
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from threading import Thread
from typing import Any

import mlflow
import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.utils import is_remote

import scgpt_batch
from scgpt_batch.command_result import OK, TOO_MANY_FAILED_ROWS, CommandResult, plural
from scgpt_batch.errors import ConfigError, in_one_line, plain_line
from scgpt_batch.inference.model_parameters import check_model_parameters
from scgpt_batch.parameters import Parameters
from scgpt_batch.registry.experiment import use_experiment
from scgpt_batch.registry.resolve import resolve
from scgpt_batch.registry.sample_answers import code_difference, registered_by
from scgpt_batch.settings import EmbedSettings
from scgpt_batch.spark import tables
from scgpt_batch.spark.job import Job
from scgpt_batch.spark.lineage import log_input
from scgpt_batch.spark.maintain import prune
from scgpt_batch.spark.persistence import require_persist
from scgpt_batch.spark.plan import EmbedPlan, plan
from scgpt_batch.spark.progress import CellProgress
from scgpt_batch.spark.search_table import create_search_table, update_search_table
from scgpt_batch.spark.work_to_do import results_to_remove, rows_to_embed, runs_so_far, same_state, state_after
from scgpt_batch.spark.workers import worker_setup_error

logger = logging.getLogger(__name__)

Line = dict[str, str | float | datetime]  # of the table of runs

OTHER_CODE = "+other-code"  # appended to the package version of runs that --allow-other-code permitted


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


def embed_table(spark: SparkSession, settings: EmbedSettings, parameters: Parameters) -> EmbedResult | EmbedPlan:
    """Embed the pending rows of a table; with `plan`, only count them.

    Raises
    ------
    ConfigError
        A table, model or parameter is missing or invalid; nothing was written.
    """
    job = _job(spark, settings, parameters)
    if settings.plan:
        return plan(job)
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
    earlier = runs_so_far(job)
    ledger = None if job.ledger in job.created else tables.snapshot(job.spark, job.ledger)
    same = same_state(job, ledger, earlier)
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
    Thread(target=_import_what_waves_need, name="imports").start()
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
    output = job.output_snapshot()
    line = _ended(job, "finished", clock, output.version)
    if (state := state_after(job, ledger_version, output)) is not None:
        line["state"] = state
    tables.update(job.spark, job.runs, line, _of_run(job))
    return float(line["seconds"])  # type: ignore[arg-type]


def _import_what_waves_need() -> None:
    """Import torch and scanpy while Spark looks for pending rows: it takes seconds, and an idle run needs neither."""
    with suppress(Exception):  # imported again where they are used, which reports the error
        import_module("scgpt_batch.spark.wave")


def _end_idle_run(job: Job, same: pd.Series, clock: float) -> float:
    """Record a run that has nothing to do, as the run in `same` left the tables; return the seconds that it took."""
    job.counts["rows_in"] = job.counts["rows_skipped"] = int(same["rows_in"])
    line = _begun(job) | _ended(job, "finished", clock, int(same["output_version"])) | {"state": same["state"]}
    tables.insert(job.spark, job.runs, line)
    return float(line["seconds"])


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
    work = rows_to_embed(job, rows, first=job.ledger in job.created)
    from scgpt_batch.spark.wave import embed_wave, still_pending  # see _import_what_waves_need

    job.counts["rows_in"] += work.rows_in
    job.counts["rows_skipped"] += work.rows_in - len(work.pending)
    progress = CellProgress(job.spark, int(work.pending["cells"].sum()))
    with progress.shown():
        for number, wave in enumerate(work.waves(job.settings.wave_cells)):
            with progress.wave(int(wave["cells"].sum())):
                embed_wave(job, rows, still_pending(job, wave) if number else wave, progress.counter)


# --- rows that left the input ---------------------------------------------------------------------


def _remove_vanished(job: Job, earlier: pd.DataFrame | None) -> None:
    gone = results_to_remove(job, earlier)
    if gone is None:
        return
    gone.remove(job.spark, job.output, job.ledger)
    job.ledger_commits += bool(len(gone.ledger))
    job.counts["rows_removed"] += gone.rows
    if gone.rows:
        logger.info("removed embeddings and ledger lines of %d rows that are no longer in %s", gone.rows, job.input)


# --- the search table -----------------------------------------------------------------------------


def _update_search_table(job: Job) -> None:
    """Bring the search table to the lines of this model version and these parameters.

    In static mode a gene has the same vector in every row, so it gets one line, without a row.
    """
    from scgpt_batch.spark.wave import as_embeddings, vectors_of_genes

    table = tables.table_name(job.settings.search_table)
    lines = job.spark.table(job.output).where(job.stamped).select(*job.spark.table(table).columns)
    if job.parameters.mode == "static":
        of_no_row = {name: F.lit(None).cast("string") for name in ("adata_id", "group", "content_hash")}
        genes = as_embeddings(job, lines.select("gene").distinct().withColumns(of_no_row))
        update_search_table(
            job.spark, table, genes, lambda some: some.join(vectors_of_genes(job, some), "gene"), same=["embedding_id"]
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

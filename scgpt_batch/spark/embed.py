"""The main job: rows of AnnData in Delta -> registered model -> embeddings, ledger and runs in Delta.

Rows that have a result for this content, model version and parameters are skipped. The rest goes in waves of bounded
size; of each wave the embeddings are committed first, then the ledger lines that tell of them. A run that is killed
anywhere leaves at most one wave of embeddings without ledger lines: the next run, for which these rows are missing,
writes them in place of what it finds.

Rows of one `sample_id` share preprocessing decisions, and contextual mode averages over all of their cells: its lines
then carry the sample's id as adata_id, while each row keeps its line in the ledger.
"""

import hashlib
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import mlflow
import pandas as pd
from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.utils import is_remote

import scgpt_batch
from scgpt_batch import registry
from scgpt_batch.embedder import check_model_parameters
from scgpt_batch.errors import ConfigError, in_one_line
from scgpt_batch.parameters import Parameters
from scgpt_batch.settings import EmbedSettings, Summary
from scgpt_batch.spark import tables
from scgpt_batch.spark.maintain import prune
from scgpt_batch.spark.missing import Missing, between_neighbours, missing_rows, n_tasks, with_tasks
from scgpt_batch.spark.samples import decisions, means
from scgpt_batch.spark.udf import (
    ANSWERS,
    VECTORS,
    ModelRef,
    Work,
    embed_rows,
    embed_rows_alone,
    static_vectors,
)

logger = logging.getLogger(__name__)

WAVE_TRIES = 3  # the first as fast as possible, the others with each row in a process of its own
LIBRARIES_MB, ROW_MB_PER_1000_CELLS = 900, 120  # of a worker: torch and scanpy; a row of 2,000 genes a cell, measured
RIVAL_DAYS = 2  # from midnight, so a day or more in any time zone: as long a run may be unknown to one beside it

PAYLOAD = (
    "adata_id", "content_hash", "adata_sparsematrix", "x_data", "x_indices", "x_indptr", "n_obs", "n_vars",
    "adata_obs", "adata_var", "x_dtype", "decisions",
)  # fmt: skip
LEDGER_KEY = ("adata_id", "content_hash", "mode", "model_name", "model_version", "params_hash")
# how Spark says that Python, not a table or the cluster, is at fault
_LOST_WORKER = ("Python worker", "PythonException", "PYTHON_EXCEPTION", "ExecutorLostFailure")


@dataclass
class Job:
    """One run: what it reads, with what, and where it writes."""

    spark: SparkSession
    settings: EmbedSettings
    parameters: Parameters
    model: registry.ResolvedModel
    input: str
    input_version: int  # the whole run reads this snapshot
    output: str
    ledger: str
    runs: str
    started: datetime
    run_id: str = ""
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("rows_in", "rows_ok", "rows_failed", "rows_skipped", "cells", "embeddings"), 0
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
    def work(self) -> Work:
        """What the workers do with each row."""
        model = ModelRef(
            checkpoint=str(self.model.checkpoint),
            digest=self.model.digest,
            uri=self.model.uri,
            tracking_uri=mlflow.get_tracking_uri(),
            registry_uri=mlflow.get_registry_uri(),
        )
        return Work(model, self.parameters, self.settings.row_timeout)


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
    _create_tables(job)
    if settings.experiment:
        mlflow.set_experiment(settings.experiment)
    with mlflow.start_run(run_name=f"embed {parameters.mode}") as run:
        job.run_id = run.info.run_id
        return _run(job)


def _job(spark: SparkSession, settings: EmbedSettings, parameters: Parameters) -> Job:
    model = registry.resolve(settings.model_uri)
    check_model_parameters(parameters, model.config)
    input_table, output = tables.table_name(settings.input_table), tables.table_name(settings.output_table)
    tables.read(spark, input_table, tables.ADATA_ROWS)
    return Job(
        spark=spark,
        settings=settings,
        parameters=parameters,
        model=model,
        input=input_table,
        input_version=tables.version(spark, input_table),
        output=output,
        ledger=tables.table_name(settings.ledger_table or tables.beside(output, "_ledger")),
        runs=tables.table_name(settings.runs_table or tables.beside(output, "_runs")),
        started=datetime.now(UTC),
    )


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
        if job.settings.trigger:
            _embed_stream(job, clock)
        else:
            rows = tables.read(job.spark, job.input, tables.ADATA_ROWS, version=job.input_version)
            _embed_missing(job, rows, clock)
        if job.settings.prune:
            prune(job.spark, job.output, job.ledger, job.settings.prune)
    except BaseException:  # Ctrl-C too
        _end_failed_run(job, clock)
        raise
    seconds = _end_run(job, "finished", clock)
    mlflow.log_metrics({**job.counts, "seconds": seconds})
    return {
        "run_id": job.run_id,
        "mode": job.parameters.mode,
        "model_uri": job.model.uri,
        "model_version": job.model.version,
        **job.counts,
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
        "input_table": job.input, "input_version": job.input_version, "output_table": job.output,
        "package_version": scgpt_batch.__version__,
    }  # fmt: skip
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


def _missing(job: Job, rows: DataFrame) -> Missing:
    ledger = job.spark.table(job.ledger).where(job.stamped)
    return missing_rows(rows, ledger, retry_failed=job.settings.retry_failed, name=job.input)


# --- a wave ---------------------------------------------------------------------------------------


def _embed_wave(job: Job, rows: DataFrame, wave: pd.DataFrame) -> None:
    """Compute and commit a wave; should a Python worker be lost on the way, again with each row in a process."""
    if wave.empty:
        return
    for attempt in range(WAVE_TRIES):
        try:
            ledger = _answered(job, rows, wave, alone=attempt > 0)
            break
        except Exception as exc:  # py4j and Connect have different types for one fact
            if attempt + 1 == WAVE_TRIES or not any(sign in str(exc) for sign in _LOST_WORKER):
                raise
            logger.warning(
                "a wave of %d rows lost a Python worker (%s); it is repeated with each row in a process of its own",
                len(wave), in_one_line(exc),
            )  # fmt: skip
    failed = int((ledger["status"] == "failed").sum())
    job.counts["rows_failed"] += failed
    job.counts["rows_ok"] += len(ledger) - failed
    for name in ("cells", "embeddings"):
        job.counts[name] += int(ledger.loc[ledger["status"] == "ok", name].sum())
    for _, line in ledger[ledger["status"] == "failed"].head(5).iterrows():
        logger.warning("row %s failed: %s: %s", line["adata_id"], line["error_class"], line["error_message"])


def _answered(job: Job, rows: DataFrame, wave: pd.DataFrame, *, alone: bool) -> pd.DataFrame:
    """Compute the answers once, onto the executors' disks; commit the embeddings, then the ledger; return its lines."""
    work = replace(job.work, sums=_summed(job, wave))
    run = embed_rows_alone(work) if alone else embed_rows(work)
    answers = _payload(job, rows, wave).mapInArrow(run, from_arrow_schema(ANSWERS)).persist(StorageLevel.DISK_ONLY)
    try:
        ledger: pd.DataFrame = _ledger_lines(job, answers).toPandas()
        lines = answers.where("report IS NULL")
        if _summed(job, wave):
            lines = _sample_means(job, lines, wave, ledger)
        tables.replace(_embeddings(job, lines), job.output, lambda: _replaceable(job, wave))
        tables.upsert(job.spark, job.ledger, _ledger_lines(job, answers), LEDGER_KEY)
        return ledger
    finally:
        answers.unpersist()


def _rivals(job: Job) -> list[str]:
    """The runs that may have embeddings without ledger lines, or lines we have not seen.

    That is: killed or failed ones, those at work beside this one, those that have just ended, and this one itself.
    """
    runs = job.spark.table(job.runs).where(F.col("output_table") == job.output)
    since = F.lit(job.started.date() - timedelta(days=RIVAL_DAYS))  # a time would be compiled anew in each run
    open_runs = runs.where((F.col("status") != "finished") | (F.col("finished_at") > since))
    return [row["run_id"] for row in open_runs.select("run_id").collect()]


def _still_missing(job: Job, wave: pd.DataFrame) -> pd.DataFrame:
    """Leave out what a run beside this one has done since we looked."""
    others = [run for run in _rivals(job) if run != job.run_id]
    if not others or _samples(wave):  # a sample is done as a whole
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
    ids = ", ".join(map(tables.literal, {*wave["adata_id"], *_samples(wave)}))
    condition = f"{job.stamped} AND adata_id IN ({ids})"
    if wave["known"].any():
        return condition
    return f"{condition} AND run_id IN ({', '.join(map(tables.literal, _rivals(job)))})"


def _payload(job: Job, rows: DataFrame, wave: pd.DataFrame) -> DataFrame:
    """Give each task its share of the wave's rows."""
    rows = rows.where(between_neighbours(wave))
    if job.parameters.mode == "static" and (wave["copies"] == 1).all() and not _samples(wave):
        # some 25 ms a row: moving the payload between tasks would cost more
        chosen = rows.join(F.broadcast(job.spark.createDataFrame(wave[["adata_id"]])), "adata_id")
    else:
        chosen = rows.join(F.broadcast(with_tasks(job.spark, wave)), "adata_id").repartition(n_tasks(wave), "task")
        if (wave["copies"] > 1).any():
            chosen = chosen.dropDuplicates(["adata_id"])
    if _samples(wave):
        decided = decisions(chosen, job.work.model, job.parameters)
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


def _sample_means(job: Job, sums: DataFrame, wave: pd.DataFrame, ledger: pd.DataFrame) -> DataFrame:
    """Average over all cells of each sample: lines keyed by sample_id, with a hash over its rows' contents."""
    members = wave[["adata_id", "sample"]].merge(ledger[["adata_id", "content_hash"]], on="adata_id")
    contents = members.groupby("sample")["content_hash"].agg(lambda hashes: _joint_hash(sorted(hashes)))
    keys = job.spark.createDataFrame(members[["adata_id", "sample"]], "adata_id STRING, sample_id STRING")
    hashes = job.spark.createDataFrame(contents.reset_index(), "sample_id STRING, content_hash STRING")
    averaged = means(sums.drop("content_hash").join(F.broadcast(keys), "adata_id"))
    return averaged.join(F.broadcast(hashes), "sample_id").withColumnRenamed("sample_id", "adata_id")


def _joint_hash(hashes: list[str]) -> str:
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:32]


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
    stamps = _stamps(job) | {"run_id": F.lit(job.run_id), "embedded_at": F.current_timestamp()}
    stamped = lines.select(*columns, "content_hash").withColumns(stamps)
    return stamped.select(*(f.name for f in job.spark.table(job.output).schema if f.name in stamped.columns))


def _with_static_vectors(job: Job, lines: DataFrame, order: Sequence[str]) -> DataFrame:
    """Join each gene's vector, computed once a wave.

    Lines are put in order while they are small. A merge join by gene keeps it, so equal vectors lie side by side and
    compress to nothing.
    """
    vectors = lines.select("gene").distinct().mapInArrow(static_vectors(job.work.model), from_arrow_schema(VECTORS))
    ordered = lines.drop("embedding").repartition("gene").sortWithinPartitions(*order)
    return ordered.hint("merge").join(vectors.hint("merge"), "gene")


def _ledger_lines(job: Job, answers: DataFrame) -> DataFrame:
    lines = answers.where("report IS NOT NULL").select("adata_id", "content_hash", "report.*")
    stamps = _stamps(job) | {"run_id": F.lit(job.run_id), "at": F.current_timestamp()}
    return lines.withColumns(stamps)


def _stamps(job: Job) -> dict[str, Column]:
    return {name: F.lit(value) for name, value in job.stamps.items()}


# --- what a person sees ---------------------------------------------------------------------------


def _plan(job: Job) -> Summary:
    """Say what a run would do, and how long it took per cell before; write nothing."""
    rows = tables.read(job.spark, job.input, tables.ADATA_ROWS, version=job.input_version)
    if tables.exists(job.spark, job.ledger):
        missing = _missing(job, rows)
    else:
        nothing = job.spark.createDataFrame([], tables.LEDGER)
        missing = missing_rows(rows, nothing, retry_failed=False, name=job.input)
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


def _worker_memory(job: Job, missing: Missing) -> int:
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

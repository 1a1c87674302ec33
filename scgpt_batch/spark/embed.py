"""The main job: rows of AnnData in Delta -> registered model -> embeddings, ledger and runs in Delta.

Rows that have a result for this content, model version and parameters are skipped. The rest goes in waves of bounded
size; of each wave the embeddings are committed first, then the ledger lines that tell of them.
"""

import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import mlflow
import pandas as pd
from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

import scgpt_batch
from scgpt_batch import registry
from scgpt_batch.embedder import check_model_parameters
from scgpt_batch.errors import ConfigError
from scgpt_batch.parameters import Parameters
from scgpt_batch.settings import EmbedSettings, Summary
from scgpt_batch.spark import tables
from scgpt_batch.spark.udf import ANSWERS_DDL, VECTORS_DDL, ModelRef, embed_rows, static_vectors

logger = logging.getLogger(__name__)

WAVE_CELLS = 200_000  # of a wave: what a killed run has to do again at most
TASK_CELLS = 5_000  # of a task: even work for all workers
ROW_CELLS_UNKNOWN = 1_000  # taken for a row of a foreign table that does not say its n_obs

KEY = ("adata_id", "mode", "model_name", "model_version", "params_hash")
PAYLOAD = (
    "adata_id", "content_hash", "adata_sparsematrix", "x_data", "x_indices", "x_indptr", "n_obs", "n_vars",
    "adata_obs", "adata_var", "x_dtype",
)  # fmt: skip


@dataclass
class Job:
    """One run: what it reads, with what, and where it writes."""

    spark: SparkSession
    settings: EmbedSettings
    parameters: Parameters
    model: registry.ResolvedModel
    run_id: str
    input: str
    input_version: int  # the whole run reads this snapshot
    output: str
    ledger: str
    runs: str
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


def embed_table(spark: SparkSession, settings: EmbedSettings, parameters: Parameters) -> Summary:
    """Embed the rows of a table that have no result yet; return the summary.

    Raises
    ------
    ConfigError
        A table, model or parameter is missing or wrong; nothing was written.
    """
    model = registry.resolve(settings.model_uri)
    check_model_parameters(parameters, model.config)
    input_table, output = tables.table_name(settings.input_table), tables.table_name(settings.output_table)
    tables.read(spark, input_table, tables.ADATA_ROWS)
    job = Job(
        spark=spark,
        settings=settings,
        parameters=parameters,
        model=model,
        run_id="",
        input=input_table,
        input_version=tables.version(spark, input_table),
        output=output,
        ledger=tables.table_name(settings.ledger_table or tables.beside(output, "_ledger")),
        runs=tables.table_name(settings.runs_table or tables.beside(output, "_runs")),
    )
    _create_tables(job)
    if settings.experiment:
        mlflow.set_experiment(settings.experiment)
    with mlflow.start_run(run_name=f"embed {parameters.mode}") as run:
        job.run_id = run.info.run_id
        return _run(job)


def _run(job: Job) -> Summary:
    started, clock, status = datetime.now(UTC), time.monotonic(), "failed"
    logger.info("run %s: %s, %s mode, %s -> %s", job.run_id, job.model.uri, job.parameters.mode, job.input, job.output)
    mlflow.log_params(job.parameters.model_dump() | {"model_uri": job.model.uri})
    try:
        _embed_waves(job, clock)
        status = "finished"
    finally:
        seconds = round(time.monotonic() - clock, 3)
        _write_run(job, started, status, seconds)
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


def _create_tables(job: Job) -> None:
    columns = tables.CELL_EMBEDDINGS if job.parameters.mode == "cell" else tables.GENE_EMBEDDINGS
    tables.create(job.spark, job.output, columns)
    tables.create(job.spark, job.ledger, tables.LEDGER)
    tables.create(job.spark, job.runs, tables.RUNS)


def _embed_waves(job: Job, clock: float) -> None:
    rows = tables.read(job.spark, job.input, tables.ADATA_ROWS, version=job.input_version)
    pending = _pending(job, rows)
    total = int(pending["cells"].sum())
    done = 0
    for wave in _waves(pending):
        _embed_wave(job, rows, wave)
        done += int(wave["cells"].sum())
        _show_progress(job, len(pending), done, total, time.monotonic() - clock)


def _pending(job: Job, rows: DataFrame) -> pd.DataFrame:
    """Ask which rows have no result: adata_id, cells, copies (equal rows of one key); largest first.

    Content hashes that the table lacks are computed, which reads the payload, only where they decide something.
    """
    done = _done(job)
    found = None if done.head(1) else _found(rows, done)
    if found is None or (found["copies"] > 1).any():
        found = _found(rows.withColumn("content_hash", _hash()), done)
    if found["adata_id"].isna().any():
        raise ConfigError(f"{job.input} has rows without adata_id: give each row a key")
    twice = found[found["contents"] > 1]
    if len(twice):
        first = twice["adata_id"].iloc[0]
        raise ConfigError(f"{job.input} has {len(twice)} adata_id with several contents, first {first!r}")
    job.counts["rows_in"] = int(found["copies"].sum())
    pending = found[found["done"].isna()].sort_values(["cells", "adata_id"], ascending=[False, True])
    job.counts["rows_skipped"] = job.counts["rows_in"] - len(pending)
    return pending[["adata_id", "cells", "copies"]]


def _done(job: Job) -> DataFrame:
    """The rows and contents that have a result under the run's stamps."""
    done = _stamped_alike(job, job.spark.table(job.ledger))
    if job.settings.retry_failed:
        done = done.where("status = 'ok'")
    return done.select("adata_id", "content_hash").distinct().withColumn("done", F.lit(True))


def _stamped_alike(job: Job, lines: DataFrame) -> DataFrame:
    """Of a table's lines, those of the run's mode, model and parameters."""
    for name, value in job.stamps.items():
        lines = lines.where(F.col(name) == value)
    return lines


def _found(rows: DataFrame, done: DataFrame) -> pd.DataFrame:
    keys = rows.groupBy("adata_id").agg(
        F.max(F.coalesce("n_obs", F.lit(ROW_CELLS_UNKNOWN))).alias("cells"),
        F.count("*").alias("copies"),
        F.countDistinct("content_hash").alias("contents"),
        F.first("content_hash").alias("content_hash"),
    )
    return keys.join(done, ["adata_id", "content_hash"], "left").toPandas()


def _hash() -> Column:
    return F.coalesce("content_hash", tables.content_hash())


def _waves(pending: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Cut the rows into waves of WAVE_CELLS; a larger row is a wave of its own."""
    wave = (pending["cells"].cumsum() - 1) // WAVE_CELLS
    for _, rows in pending.groupby(wave, sort=True):
        yield rows


def _embed_wave(job: Job, rows: DataFrame, wave: pd.DataFrame) -> None:
    ids = job.spark.createDataFrame(wave[["adata_id"]])
    ref = ModelRef(
        checkpoint=str(job.model.checkpoint),
        digest=job.model.digest,
        uri=job.model.uri,
        tracking_uri=mlflow.get_tracking_uri(),
        registry_uri=mlflow.get_registry_uri(),
    )
    work = embed_rows(ref, job.parameters, job.settings.min_coverage)
    answers = (
        _spread(job, rows.join(F.broadcast(ids), "adata_id"), wave)
        .withColumn("content_hash", _hash())
        .select(*PAYLOAD)
        .mapInArrow(work, ANSWERS_DDL)
        .persist(StorageLevel.DISK_ONLY)  # the model runs once, two tables are written
    )
    try:
        ledger: pd.DataFrame = _ledger_lines(job, answers).toPandas()
        _clear(job, ids)
        tables.append(_embeddings(job, answers, ref), job.output)
        tables.append(_ledger_lines(job, answers), job.ledger)
    finally:
        answers.unpersist()
    failed = int((ledger["status"] == "failed").sum())
    job.counts["rows_failed"] += failed
    job.counts["rows_ok"] += len(ledger) - failed
    for name in ("cells", "embeddings"):
        job.counts[name] += int(ledger.loc[ledger["status"] == "ok", name].sum())
    for _, line in ledger[ledger["status"] == "failed"].head(5).iterrows():
        logger.warning("row %s failed: %s: %s", line["adata_id"], line["error_class"], line["error_message"])


def _spread(job: Job, rows: DataFrame, wave: pd.DataFrame) -> DataFrame:
    """Give each task its share of rows; equal copies of a row become one."""
    if (wave["copies"] > 1).any():
        return rows.dropDuplicates(["adata_id"])
    if job.parameters.mode == "static":
        return rows  # some 25 ms a row: moving the payload between tasks would cost more
    n_tasks = min(-(-int(wave["cells"].sum()) // TASK_CELLS), len(wave))
    return rows.repartition(n_tasks, "adata_id")


def _clear(job: Job, ids: DataFrame) -> None:
    """Delete what a killed run, or an older content of the row, left under the same keys."""
    if _stamped_alike(job, job.spark.table(job.output)).head(1):
        stamped = ids.select("adata_id", *(F.lit(value).alias(name) for name, value in job.stamps.items()))
        tables.delete_matching(job.spark, job.output, stamped, KEY)


def _embeddings(job: Job, answers: DataFrame, ref: ModelRef) -> DataFrame:
    """Lines of the output table; in static mode each gene's vector is joined from one table of the vocabulary."""
    lines = answers.where("report IS NULL")
    if job.parameters.mode == "cell":
        columns, order = ["adata_id", "cell_id", "embedding"], ["adata_id", "cell_id"]
    else:
        columns, order = ["adata_id", "group", "gene", "embedding", "n_cells"], ["gene", "adata_id"]
    if job.parameters.mode == "static":
        vectors = job.spark.range(1, numPartitions=1).mapInArrow(static_vectors(ref), VECTORS_DDL)
        # a merge join leaves both sides sorted by gene: equal vectors lie side by side and compress to nothing
        lines = lines.drop("embedding").hint("merge").join(vectors.hint("merge"), "gene")
    stamped = lines.select(*columns, *_stamp_columns(job))
    return stamped.sortWithinPartitions(*order)


def _ledger_lines(job: Job, answers: DataFrame) -> DataFrame:
    lines = answers.where("report IS NOT NULL").select("adata_id", "content_hash", "report.*")
    names = [f.name for f in job.spark.createDataFrame([], tables.LEDGER).schema]
    return lines.withColumns(
        {name: F.lit(value) for name, value in job.stamps.items()}
        | {"run_id": F.lit(job.run_id), "at": F.current_timestamp()}
    ).select(*names)


def _stamp_columns(job: Job) -> list[Any]:
    stamps = [F.lit(value).alias(name) for name, value in job.stamps.items()]
    return [
        *stamps,
        F.col("content_hash"),
        F.lit(job.run_id).alias("run_id"),
        F.current_timestamp().alias("embedded_at"),
    ]


def _write_run(job: Job, started: datetime, status: str, seconds: float) -> None:
    told: dict[str, Any] = {
        "run_id": job.run_id, "started_at": started, "finished_at": datetime.now(UTC), "status": status,
        "mode": job.parameters.mode, "model_uri": job.model.uri, "model_version": job.model.version,
        "params": job.parameters.model_dump_json(), **job.counts, "seconds": seconds,
        "input_table": job.input, "input_version": job.input_version,
        "output_table": job.output, "output_version": tables.version(job.spark, job.output),
        "package_version": scgpt_batch.__version__,
    }  # fmt: skip
    schema = job.spark.createDataFrame([], tables.RUNS).schema
    tables.append(job.spark.createDataFrame([tuple(told[f.name] for f in schema)], schema), job.runs)


def _show_progress(job: Job, rows: int, cells_done: int, cells: int, seconds: float) -> None:
    if not sys.stderr.isatty():
        return
    done = job.counts["rows_ok"] + job.counts["rows_failed"]
    rate = cells_done / seconds
    left = (cells - cells_done) / rate if rate else 0
    line = f"{done} of {rows} rows, {rate:,.0f} cells/s, about {left:,.0f} s left"
    print(f"\r{line:<70}", end="" if done < rows else "\n", file=sys.stderr, flush=True)

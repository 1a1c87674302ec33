"""A wave of rows: computed by the workers, then committed, embeddings first and ledger lines after them."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

import mlflow
import pandas as pd
import pyarrow as pa
from pyspark.accumulators import Accumulator
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from scgpt_batch.errors import plain_line
from scgpt_batch.inference.results import warning_kind
from scgpt_batch.spark import tables
from scgpt_batch.spark.job import Job
from scgpt_batch.spark.pending import key_range_filter, n_tasks, sample_hash, with_tasks
from scgpt_batch.spark.sample_decisions import decisions, means
from scgpt_batch.spark.work_to_do import environment
from scgpt_batch.spark.worker import ANSWERS, VECTORS, ModelRef, WorkerTask, embed_rows, static_vectors
from scgpt_batch.spark.workers import computed

logger = logging.getLogger(__name__)

CONCURRENT_DAYS = 2  # look back this far for concurrent runs; from midnight, so at least a day in any time zone

PAYLOAD = (
    "adata_id", "sample_id", "content_hash", "adata_sparsematrix", "x_data", "x_indices", "x_indptr", "n_obs", "n_vars",
    "adata_obs", "adata_var", "x_dtype", "decisions",
)  # fmt: skip
# The rows of a wave that belong to samples
MEMBERS = pa.schema([(name, pa.string()) for name in ("adata_id", "sample_id", "sample_hash", "warning")])


def embed_wave(job: Job, rows: DataFrame, wave: pd.DataFrame, counter: Accumulator | None) -> None:
    """Compute and commit a wave; `counter` gets the cells of finished rows."""
    if wave.empty:
        return
    work, payload = replace(_work(job), sums=_summed(job, wave)), _payload(job, rows, wave)

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


def still_pending(job: Job, wave: pd.DataFrame) -> pd.DataFrame:
    """Leave out rows that a concurrent run has embedded since this run read the ledger."""
    others = [run for run in _concurrent_runs(job) if run != job.run_id]
    if not others or wave["sample_id"].notna().any():  # a sample is embedded as a whole
        return wave
    lines = job.spark.table(job.ledger).where(job.stamped).where(F.col("run_id").isin(others))
    lines = lines.where(F.col("at") > F.lit(job.started)).select("adata_id", "content_hash").toPandas()
    done = wave.merge(lines.dropna(), on=["adata_id", "content_hash"])["adata_id"]
    job.counts["rows_skipped"] += len(done)
    return wave[~wave["adata_id"].isin(done)]


def _work(job: Job) -> WorkerTask:
    """Return the task of the Python workers."""
    model = ModelRef(
        checkpoint=str(job.model.checkpoint),
        digest=job.model.digest,
        uri=job.model.uri,
        tracking_uri=mlflow.get_tracking_uri(),
        registry_uri=mlflow.get_registry_uri(),
    )
    return WorkerTask(model, job.parameters, job.settings.row_timeout)


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
        chosen = rows.join(
            F.broadcast(job.spark.createDataFrame(pa.Table.from_pandas(wave[["adata_id"]], preserve_index=False))),
            "adata_id",
        )
    else:
        chosen = rows.join(F.broadcast(with_tasks(job.spark, wave)), "adata_id").repartition(n_tasks(wave), "task")
        if (wave["copies"] > 1).any():
            chosen = chosen.dropDuplicates(["adata_id"])
    if _samples(wave) and job.parameters.need_preprocess:
        decided = decisions(chosen, _work(job))
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
    return F.broadcast(job.spark.createDataFrame(pa.Table.from_pandas(members, MEMBERS, preserve_index=False)))


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
    return _as_in_table(job, as_embeddings(job, lines.select(*columns, "content_hash")), job.output)


def as_embeddings(job: Job, lines: DataFrame) -> DataFrame:
    """Add the stamps of embeddings, and their key in one column."""
    stamps = job.stamp_columns | {"embedded_at": F.current_timestamp(), "package_version": F.lit(job.package_version)}
    return lines.withColumns(stamps).withColumn("embedding_id", F.expr(tables.embedding_id(job.key)))


def _as_in_table(job: Job, lines: DataFrame, table: str) -> DataFrame:
    return lines.select(*(field.name for field in job.spark.table(table).schema if field.name in lines.columns))


def _with_static_vectors(job: Job, lines: DataFrame, order: Sequence[str]) -> DataFrame:
    """Join each gene's vector, which is computed once per wave.

    Lines are sorted before the join, while they are small. A merge join by gene keeps the order, so equal vectors are
    adjacent and compress to almost nothing.
    """
    vectors = vectors_of_genes(job, lines)
    ordered = lines.drop("embedding").repartition("gene").sortWithinPartitions(*order)
    return ordered.hint("merge").join(vectors.hint("merge"), "gene")


def vectors_of_genes(job: Job, lines: DataFrame) -> DataFrame:
    """Return the vector of each gene of `lines`."""
    genes = lines.select("gene").distinct()
    return genes.mapInArrow(static_vectors(_work(job).model), from_arrow_schema(VECTORS))


def _reports(answers: DataFrame) -> DataFrame:
    return answers.where("report IS NOT NULL").select("adata_id", "content_hash", "report.*")


def _ledger_lines(job: Job, reports: DataFrame, members: pd.DataFrame) -> DataFrame:
    """Return the ledger lines, in one partition: each row's report, with its sample and the sample's warning."""
    if len(members):
        reports = reports.join(_of_members(job, members), "adata_id", "left")
        warnings = F.when(F.isnull("warning"), F.col("warnings")).otherwise(F.concat("warnings", F.array("warning")))
        reports = reports.withColumn("warnings", warnings)
    stamps = job.stamp_columns | {
        "at": F.current_timestamp(),
        "environment": F.lit(environment()),
        "row_timeout": F.lit(float(job.settings.row_timeout)),
    }
    return _as_in_table(job, reports.withColumns(stamps), job.ledger).repartition(1)

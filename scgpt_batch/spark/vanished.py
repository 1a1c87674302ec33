"""Finds and removes the results of rows and samples that are no longer in the input table.

The ledger records which rows of the input have embeddings, and under which key: in contextual mode, the sample's id if
the row belongs to a sample. Unfinished runs can leave embeddings without ledger lines; these are found by their run.
"""

from dataclasses import dataclass
from datetime import timedelta

import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from scgpt_batch.spark import tables

STAMPS = ("mode", "model_name", "model_version", "params_hash")
LONGEST_RUN = timedelta(days=2)  # the last finished run has cleaned up after runs that began earlier than this


@dataclass(frozen=True)
class Vanished:
    """Lines to remove, each by adata_id and `STAMPS`.

    Attributes
    ----------
    embeddings
        Lines of the output table, for rows and samples that are gone.
    ledger
        Lines of the ledger, for rows that are gone.
    runs
        The runs that wrote the lines; lines of other runs stay.
    """

    embeddings: pd.DataFrame
    ledger: pd.DataFrame
    runs: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Number of rows that are gone."""
        return int(self.ledger["adata_id"].nunique())

    def remove(self, spark: SparkSession, output: str, ledger: str) -> None:
        """Remove the lines, embeddings first: after a kill in between, the ledger lines still identify the rest."""
        for table, lines in ((output, self.embeddings), (ledger, self.ledger)):
            if len(lines):
                tables.delete_lines(
                    table, spark.createDataFrame(pa.Table.from_pandas(lines, preserve_index=False)), self.runs
                )


def earlier_runs(spark: SparkSession, runs: str, input_table: str, output: str) -> pd.DataFrame:
    """Return the runs so far over an input and an output, with how each ended and what it left."""
    lines = tables.read(spark, runs, tables.RUNS)  # completes a table of an older version
    seen = lines.where((F.col("input_table") == input_table) & (F.col("output_table") == output))
    return seen.select("run_id", "status", "started_at", "rows_in", "output_version", "state").toPandas()


def unfinished(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that may have left embeddings without ledger lines which no later run has removed."""
    finished = runs["status"] == "finished"
    found = runs[~finished]
    if finished.any():
        found = found[found["started_at"] > runs.loc[finished, "started_at"].max() - LONGEST_RUN]
    return found


def vanished(rows: DataFrame, *, output: str, ledger: str, runs: pd.DataFrame) -> Vanished:
    """Find the lines of the output tables whose rows are missing in `rows`, a snapshot of the input.

    Parameters
    ----------
    runs
        The `earlier_runs` over this input. If several inputs share an output table, the lines of other runs stay.
    """
    here = rows.select("adata_id", F.coalesce("sample_id", "adata_id").alias("key"))
    ids = here.select("adata_id", F.lit(True).alias("is_row")).distinct()
    keys = here.select("key", F.lit(True).alias("is_key")).distinct()
    written = _written(rows.sparkSession, output, ledger, runs)
    found = written.join(ids, "adata_id", "left").join(keys, "key", "left")
    key_gone = F.when(F.col("mode") == "contextual", F.isnull("is_key")).otherwise(F.isnull("is_row"))
    found = found.withColumns({"row_gone": F.isnull("is_row"), "key_gone": key_gone})
    # embeddings without ledger lines have the key of a row or a sample, so only the key can be checked
    found = found.where(F.col("key_gone") | (F.col("row_gone") & F.col("reported")))
    return _sorted(found.toPandas(), tuple(runs["run_id"]))


def _sorted(found: pd.DataFrame, runs: tuple[str, ...]) -> Vanished:
    embeddings = found.loc[found["key_gone"].astype(bool), ["key", *STAMPS]].rename(columns={"key": "adata_id"})
    ledger = found.loc[found["row_gone"].astype(bool), ["adata_id", *STAMPS]]
    return Vanished(embeddings.drop_duplicates(), ledger.drop_duplicates(), runs)


def _written(spark: SparkSession, output: str, ledger: str, runs: pd.DataFrame) -> DataFrame:
    """Return what runs have written: adata_id, key, stamps, and whether the ledger has a line for it."""
    shared = F.when(F.col("mode") == "contextual", F.col("sample_id"))
    lines = tables.read(spark, ledger, tables.LEDGER).where(F.col("run_id").isin(runs["run_id"].tolist()))
    key = F.coalesce(shared, "adata_id").alias("key")
    reported = lines.select("adata_id", key, *STAMPS, F.lit(True).alias("reported")).distinct()
    remains = unfinished(runs)
    if remains.empty:
        return reported
    remaining = spark.table(output).where(F.col("run_id").isin(remains["run_id"].tolist()))
    key = F.col("adata_id").alias("key")
    return reported.unionByName(remaining.select("adata_id", key, *STAMPS, F.lit(False).alias("reported")).distinct())

"""What an output table holds of rows, or samples, that its input table no longer has; and its removal.

The ledger says which rows of the input have embeddings, and by which key: in contextual mode the sample's id where a
row belongs to a sample. Runs that did not finish may have left embeddings that no ledger line reports; these are found
by their run.
"""

from dataclasses import dataclass
from datetime import timedelta

import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from scgpt_batch.spark import tables

STAMPS = ("mode", "model_name", "model_version", "params_hash")
LONGEST_RUN = timedelta(days=2)  # what began longer before the last finished run was seen by that


@dataclass(frozen=True)
class Vanished:
    """Lines to remove, each by adata_id and `STAMPS`.

    Attributes
    ----------
    embeddings
        Lines of the output table: of rows and of samples that are gone.
    ledger
        Lines of the ledger: of rows that are gone.
    runs
        The runs that have written them; lines of others stay.
    """

    embeddings: pd.DataFrame
    ledger: pd.DataFrame
    runs: tuple[str, ...]

    @property
    def rows(self) -> int:
        """How many rows are gone."""
        return int(self.ledger["adata_id"].nunique())

    def remove(self, spark: SparkSession, output: str, ledger: str) -> None:
        """Remove the lines: the embeddings first, so that a killed run leaves ledger lines by which to find them."""
        for table, lines in ((output, self.embeddings), (ledger, self.ledger)):
            if len(lines):
                tables.delete_lines(table, spark.createDataFrame(lines), self.runs)


def vanished(rows: DataFrame, input_table: str, *, output: str, ledger: str, runs: str, run_id: str) -> Vanished:
    """Find what the tables of an output hold of rows that `rows`, a snapshot of the input, lacks.

    Of several inputs that share an output table, each run looks at what runs over its own input have written.

    Parameters
    ----------
    run_id
        The run that asks, which has written nothing yet.
    """
    spark = rows.sparkSession
    seen = spark.table(runs).where((F.col("input_table") == input_table) & (F.col("output_table") == output))
    earlier: pd.DataFrame = seen.where(F.col("run_id") != run_id).select("run_id", "status", "started_at").toPandas()
    if earlier.empty:
        return _sorted(pd.DataFrame(columns=["adata_id", "key", *STAMPS, "row_gone", "key_gone"]), ())
    here = rows.select("adata_id", F.coalesce("sample_id", "adata_id").alias("key"))
    ids = here.select("adata_id", F.lit(True).alias("is_row")).distinct()
    keys = here.select("key", F.lit(True).alias("is_key")).distinct()
    found = _written(spark, output, ledger, earlier).join(ids, "adata_id", "left").join(keys, "key", "left")
    key_gone = F.when(F.col("mode") == "contextual", F.isnull("is_key")).otherwise(F.isnull("is_row"))
    found = found.withColumns({"row_gone": F.isnull("is_row"), "key_gone": key_gone})
    # what no ledger line reports is keyed by a row or by a sample: then only the key can be gone
    found = found.where(F.col("key_gone") | (F.col("row_gone") & F.col("reported")))
    return _sorted(found.toPandas(), tuple(earlier["run_id"]))


def _sorted(found: pd.DataFrame, runs: tuple[str, ...]) -> Vanished:
    embeddings = found.loc[found["key_gone"].astype(bool), ["key", *STAMPS]].rename(columns={"key": "adata_id"})
    ledger = found.loc[found["row_gone"].astype(bool), ["adata_id", *STAMPS]]
    return Vanished(embeddings.drop_duplicates(), ledger.drop_duplicates(), runs)


def _written(spark: SparkSession, output: str, ledger: str, runs: pd.DataFrame) -> DataFrame:
    """What runs have written: adata_id, key, stamps, and whether the ledger reports it."""
    shared = F.when(F.col("mode") == "contextual", F.col("sample_id"))
    lines = tables.read(spark, ledger, tables.LEDGER).where(F.col("run_id").isin(runs["run_id"].tolist()))
    key = F.coalesce(shared, "adata_id").alias("key")
    reported = lines.select("adata_id", key, *STAMPS, F.lit(True).alias("reported")).distinct()
    finished = runs["status"] == "finished"
    unfinished = runs[~finished]
    if finished.any():
        unfinished = unfinished[unfinished["started_at"] > runs.loc[finished, "started_at"].max() - LONGEST_RUN]
    if unfinished.empty:
        return reported
    left = spark.table(output).where(F.col("run_id").isin(unfinished["run_id"].tolist()))
    key = F.col("adata_id").alias("key")
    return reported.unionByName(left.select("adata_id", key, *STAMPS, F.lit(False).alias("reported")).distinct())

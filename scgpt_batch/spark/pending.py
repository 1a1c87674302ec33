"""Pending rows: the rows that have no result yet, divided into waves and tasks of even size.

Only keys, hashes, sizes and times of the input and the ledger are read, neither payload nor vectors.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pandas as pd
import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, Observation, SparkSession, Window, WindowSpec
from pyspark.sql import functions as F

from scgpt_batch.errors import ConfigError
from scgpt_batch.spark import tables
from scgpt_batch.spark.persistence import persisted

WAVE_ROWS = 5_000  # maximum per wave: their keys are in the condition of its commit
TASK_CELLS = 1_000  # per task: even work for every device, independent of the number of CPU cores
LEAST_TASKS = 8  # per wave of at least as many rows, so that a small wave is distributed too
ROW_CELLS_UNKNOWN = 1_000  # assumed for rows whose n_obs is missing or impossible (negative, NaN, 10^12)
MOST_CELLS = 2**31 - 1


@dataclass(frozen=True)
class PendingRows:
    """The pending rows of a table.

    Attributes
    ----------
    rows_in
        Number of rows in the table.
    pending
        Rows without a result, largest first: adata_id, content_hash (None if not needed yet), cells, copies (number of
        equal rows with this key), known (the ledger has a line for the key), sample_id (if the rows of a sample depend
        on each other), sample (the same for samples of several rows, else None), ingested_at (microseconds, if the
        table has it). If one row of a sample lacks a result, all of the sample's rows are pending.
    """

    rows_in: int
    pending: pd.DataFrame

    def waves(self, cells: int) -> Iterator[pd.DataFrame]:
        """Yield waves of at most `cells` cells and `WAVE_ROWS` rows, starting with the wave of the largest row.

        A wave's rows are neighbours in the table, by time of ingestion and key, so that reading them skips other files
        (`key_range_filter`). A row or sample that is larger than a wave is a wave of its own. A sample is never
        divided, and never in a wave with single rows.
        """
        rows = self.pending.assign(unit=self.pending["sample"].fillna(self.pending["adata_id"]))
        rows["shared"] = rows["sample"].notna()
        units = rows.groupby(["shared", "unit"], as_index=False).agg(
            size=("cells", "sum"), rows=("cells", "size"), at=("ingested_at", "max")
        )
        units = units.sort_values(["shared", "at", "unit"], na_position="first")
        units["wave"] = _cut(units, cells)
        placed = rows.merge(units[["shared", "unit", "wave"]], on=["shared", "unit"])
        waves = [wave[self.pending.columns].reset_index(drop=True) for _, wave in placed.groupby("wave")]
        yield from sorted(waves, key=lambda wave: -wave["cells"].max())


def _cut(units: pd.DataFrame, cells: int) -> list[int]:
    """Return the wave number of each unit, filling waves in order."""
    numbers: list[int] = []
    wave, kind, n_cells, n_rows = 0, None, 0, 0
    for shared, size, rows in zip(units["shared"], units["size"], units["rows"], strict=True):
        if numbers and (shared != kind or n_cells + size > cells or n_rows + rows > WAVE_ROWS):
            wave, n_cells, n_rows = wave + 1, 0, 0
        kind, n_cells, n_rows = shared, n_cells + size, n_rows + rows
        numbers.append(wave)
    return numbers


def key_range_filter(wave: pd.DataFrame) -> Column:
    """Return a condition that limits rows to the wave's range of keys and, if known, of times of ingestion.

    With it, Delta skips files, and Parquet row groups, outside the range. A join with the wave's keys alone would read
    the payload of the whole table.
    """
    ids, times = wave["adata_id"], wave["ingested_at"]
    condition = F.col("adata_id").between(F.lit(ids.min()), F.lit(ids.max()))
    if times.isna().any():
        return condition
    first, last = (F.timestamp_micros(F.lit(int(time))) for time in (times.min(), times.max()))
    return condition & F.col("ingested_at").between(first, last)


def pending_rows(rows: DataFrame, ledger: DataFrame, *, counts: Column, samples: bool, name: str) -> PendingRows:
    """Find the rows without a result, which is a ledger line for their content and for the contents of their sample.

    Parameters
    ----------
    rows
        The `adata_rows` table. Missing content hashes are computed, which reads payload, only if they are needed: when
        the ledger has such a row or its sample, or an adata_id occurs twice.
    ledger
        The ledger's lines for the run's mode, model and parameters; the newest line of a row counts.
    counts
        Whether a ledger line is a result; rows with other lines are tried again.
    samples
        Whether the rows of a sample depend on each other (`rows_depend`); if not, `sample_id` is not read.
    name
        The input table's, for messages.

    Raises
    ------
    ConfigError
        Rows lack an adata_id, share one with different contents, or a sample_id is another row's adata_id.
    """
    if not samples:
        rows = rows.withColumn("sample_id", F.lit(None).cast("string"))
    pending = _collect(_found(rows, ledger, counts, samples), name)
    if pending is None:
        hashed = rows.withColumn("content_hash", tables.row_hash())
        pending = _collect(_found(hashed, ledger, counts, samples), name)
    assert pending is not None  # with every hash known, nothing is undecided
    return pending


def sample_hash(sample_id: str, hashes: Iterable[str]) -> str:
    """Return the hash of a sample's id and its rows' content hashes, in any order; `_sample_hash` in SQL."""
    return hashlib.sha256("\n".join([sample_id, *sorted(hashes)]).encode()).hexdigest()[:32]


def _sample_hash(members: WindowSpec) -> Column:
    contents = F.array_sort(F.collect_list("content_hash").over(members))
    text = F.concat_ws("\n", F.array("sample_id"), contents)
    return F.when(F.isnotnull("sample_id"), F.substring(F.sha2(text, 256), 1, 32))


def _collect(found: DataFrame, name: str) -> PendingRows | None:
    """Collect the pending rows; None if that depends on content hashes which the table lacks."""
    keys = Observation("keys")
    with persisted(found, StorageLevel.MEMORY_AND_DISK_DESER) as found:  # read twice if there are samples
        columns = ("adata_id", "content_hash", "cells", "copies", "known", "sample_id", "sample", "ingested_at")
        pending: pd.DataFrame = found.observe(keys, *_key_checks()).where("NOT done").select(*columns).toPandas()
        checks = keys.get
        if checks["undecided"]:
            return None
        if checks["nameless"]:
            raise ConfigError(f"{name} has rows without adata_id: give each row a key")
        if checks["ambiguous"]:
            raise ConfigError(
                f"{name}: {checks['ambiguous']} adata_id occur with several contents or samples, first "
                f"{checks['first']!r}: give each row a key of its own"
            )
        if checks["in_samples"]:
            _check_clashes(found, name)
    pending = pending.sort_values(["cells", "adata_id"], ascending=[False, True], ignore_index=True)
    pending = pending.astype({"ingested_at": "Int64"})
    return PendingRows(int(checks["rows"]), pending)


def _check_clashes(found: DataFrame, name: str) -> None:
    """Raise ConfigError if a sample_id is the adata_id of a row outside the sample: both would write the same key."""
    samples = found.select(F.col("sample_id").alias("id")).dropna().distinct()
    other = samples.join(found, (F.col("id") == F.col("adata_id")) & ~F.col("id").eqNullSafe(F.col("sample_id")))
    clash = other.select(F.min("id")).first()
    if clash and clash[0] is not None:
        raise ConfigError(
            f"{name}: {clash[0]!r} is the sample_id of some rows and the adata_id of a row outside that sample: "
            "rename the sample or the row"
        )


def _key_checks() -> list[Column]:
    """Return aggregates over the keys: the number of rows, and of keys with a problem."""
    differ = (F.col("lowest") != F.col("content_hash")) | F.col("samples_differ")
    return [
        F.coalesce(F.sum("copies"), F.lit(0)).alias("rows"),
        F.count_if(F.isnull("adata_id")).alias("nameless"),
        F.count_if(F.col("compared") & (F.col("hashes") < F.col("copies"))).alias("undecided"),
        F.count_if(differ).alias("ambiguous"),
        F.min(F.when(differ, F.col("adata_id"))).alias("first"),
        F.count("sample_id").alias("in_samples"),
    ]


def _found(rows: DataFrame, ledger: DataFrame, counts: Column, samples: bool) -> DataFrame:
    """Return each adata_id with its size, content, sample, and whether it has a result."""
    keys = rows.groupBy("adata_id").agg(
        F.max(_stated_cells()).alias("cells"),
        F.count("*").alias("copies"),
        F.count("content_hash").alias("hashes"),
        F.min("content_hash").alias("lowest"),
        F.max("content_hash").alias("content_hash"),
        F.max("sample_id").alias("sample_id"),
        (
            (F.min("sample_id") != F.max("sample_id"))
            | ((F.count("sample_id") > 0) & (F.count("sample_id") < F.count("*")))
        ).alias("samples_differ"),
        F.unix_micros(F.max("ingested_at")).alias("ingested_at"),
    )
    newest = ledger.groupBy("adata_id").agg(
        F.max_by(F.struct("content_hash", "sample_hash", F.coalesce(counts, F.lit(False)).alias("counts")), "at").alias(
            "line"
        )
    )
    found = keys.join(newest, "adata_id", "left").withColumns(
        {
            "samples_differ": F.coalesce("samples_differ", F.lit(False)),
            "known": F.isnotnull("line"),
            "sample_hash": F.lit(None).cast("string"),
            "sample": F.lit(None).cast("string"),
        }
    )
    if samples:
        members = Window.partitionBy("sample_id", F.when(F.isnull("sample_id"), F.col("adata_id")))
        several = F.isnotnull("sample_id") & (F.count("*").over(members) > 1)
        found = found.withColumns(
            {
                "sample_hash": _sample_hash(members),
                "sample": F.when(several, F.col("sample_id")),
                "known": F.max("known").over(members),
            }
        )
    same = F.col("content_hash").eqNullSafe(F.col("line.content_hash")) & F.col("sample_hash").eqNullSafe(
        F.col("line.sample_hash")
    )
    found = found.withColumns(
        {
            "compared": (F.col("copies") > 1) | F.col("known"),
            "done": F.coalesce(same & F.col("line.counts"), F.lit(False)),
        }
    ).drop("line")
    return found.withColumn("done", F.min("done").over(members)) if samples else found


def _stated_cells() -> Column:
    """Return n_obs for planning waves and tasks; the row itself is not read, so the value may be wrong."""
    stated = F.when(F.col("n_obs").between(0, MOST_CELLS), F.col("n_obs"))
    return F.coalesce(stated, F.lit(ROW_CELLS_UNKNOWN)).cast("bigint")


def n_tasks(wave: pd.DataFrame) -> int:
    """Return the number of tasks for a wave."""
    return min(max(-(-int(wave["cells"].sum()) // TASK_CELLS), LEAST_TASKS), len(wave))


def with_tasks(spark: SparkSession, wave: pd.DataFrame) -> DataFrame:
    """Assign each row of a wave to a task (adata_id, task): the largest first, always to the task with fewest cells.

    `repartition(n, "task")` with n = `n_tasks` puts each task's rows into their own partition: the task numbers are
    chosen so that Spark's hash maps them to different partitions.
    """
    n = n_tasks(wave)
    keys = spark.range(32 * n).groupBy(F.pmod(F.hash("id"), F.lit(n)).alias("slot")).agg(F.min("id").alias("key"))
    tasks = [(0, row["key"]) for row in keys.orderBy("slot").collect()]
    given = []
    for cells in wave["cells"]:  # largest first
        filled, slot = heapq.heappop(tasks)
        given.append(slot)
        heapq.heappush(tasks, (filled + int(cells), slot))
    return spark.createDataFrame(pa.table({"adata_id": pa.array(wave["adata_id"], pa.string()), "task": given}))

"""What a run has to do: the rows that have no result yet, cut into waves and tasks of even size.

Only keys, hashes, sizes and times are read, of the input and of the ledger: neither payload nor vectors.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pandas as pd
from pyspark.sql import Column, DataFrame, Observation, SparkSession, Window, WindowSpec
from pyspark.sql import functions as F

from scgpt_batch.errors import ConfigError
from scgpt_batch.spark import tables

WAVE_ROWS = 5_000  # of a wave at most: their keys stand in the condition of its commit
TASK_CELLS = 1_000  # of a task: even work for every device, whatever the number of CPU cores
LEAST_TASKS = 8  # of a wave that has as many rows, so that a small one is shared too
ROW_CELLS_UNKNOWN = 1_000  # taken for a row that does not say its n_obs, or cannot mean it (negative, NaN, 10^12)
MOST_CELLS = 2**31 - 1


@dataclass(frozen=True)
class PendingRows:
    """The rows of a table, told apart by whether they have a result.

    Attributes
    ----------
    rows_in
        Rows of the table.
    pending
        Rows without a result, largest first: adata_id, content_hash (None where not needed yet), cells, copies (equal
        rows of one key), known (the ledger has a line for the key), sample_id (where the rows of a sample depend on
        each other), sample (the same where the sample has several rows, else None), ingested_at (microseconds, where
        the table has it). A sample of which one row lacks a result is here with all of its rows.
    """

    rows_in: int
    pending: pd.DataFrame

    def waves(self, cells: int) -> Iterator[pd.DataFrame]:
        """Cut the pending rows into waves of at most so many cells and `WAVE_ROWS` rows, that of the largest row first.

        Rows of a wave are neighbours in the table, by time of ingestion and by key, so that to read them passes over
        the others (`key_range_filter`). What is larger than a wave, a row or a sample, is a wave of its own. A sample
        is never divided, and never in one wave with single rows.
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
    """Number the waves that units fill in their order."""
    numbers: list[int] = []
    wave, kind, n_cells, n_rows = 0, None, 0, 0
    for shared, size, rows in zip(units["shared"], units["size"], units["rows"], strict=True):
        if numbers and (shared != kind or n_cells + size > cells or n_rows + rows > WAVE_ROWS):
            wave, n_cells, n_rows = wave + 1, 0, 0
        kind, n_cells, n_rows = shared, n_cells + size, n_rows + rows
        numbers.append(wave)
    return numbers


def key_range_filter(wave: pd.DataFrame) -> Column:
    """The condition that rows stand between the wave's first and last, by key and, where told, by time of ingestion.

    Delta passes over files, and Parquet over parts of them, whose least and greatest values don't meet it; a join with
    the wave's keys alone reads the payload of the whole table.
    """
    ids, times = wave["adata_id"], wave["ingested_at"]
    condition = F.col("adata_id").between(F.lit(ids.min()), F.lit(ids.max()))
    if times.isna().any():
        return condition
    first, last = (F.timestamp_micros(F.lit(int(time))) for time in (times.min(), times.max()))
    return condition & F.col("ingested_at").between(first, last)


def pending_rows(rows: DataFrame, ledger: DataFrame, *, counts: Column, samples: bool, name: str) -> PendingRows:
    """Find the rows without a result: a ledger line for their content, and for the contents of their sample.

    Parameters
    ----------
    rows
        The `adata_rows` table. Content hashes that it lacks are computed, which reads payload, only where they decide
        something: when the ledger knows such a row or its sample, or an adata_id comes twice.
    ledger
        Its lines of the run's mode, model and parameters; the newest of a row counts.
    counts
        Whether a line of the ledger is a result; others are tried again.
    samples
        Whether the rows of a sample depend on each other (`samples.rows_depend`); if not, `sample_id` is not read.
    name
        The input table's, for messages.

    Raises
    ------
    ConfigError
        Rows without adata_id, different contents under one, or a sample_id that is another row's adata_id.
    """
    if not samples:
        rows = rows.withColumn("sample_id", F.lit(None).cast("string"))
    missing = _asked(_found(rows, ledger, counts, samples), name)
    if missing is None:
        hashed = rows.withColumn("content_hash", tables.row_hash())
        missing = _asked(_found(hashed, ledger, counts, samples), name)
    assert missing is not None  # with every hash known, all is decided
    return missing


def sample_hash(sample_id: str, hashes: Iterable[str]) -> str:
    """Hash a sample's id and its rows' content hashes, in whatever order these come; as `_sample_hash` does."""
    return hashlib.sha256("\n".join([sample_id, *sorted(hashes)]).encode()).hexdigest()[:32]


def _sample_hash(members: WindowSpec) -> Column:
    contents = F.array_sort(F.collect_list("content_hash").over(members))
    told = F.concat_ws("\n", F.array("sample_id"), contents)
    return F.when(F.isnotnull("sample_id"), F.substring(F.sha2(told, 256), 1, 32))


def _asked(found: DataFrame, name: str) -> PendingRows | None:
    """Ask what is missing; None where content hashes decide it that the table lacks."""
    found = found.persist()  # where there are samples, asked twice
    keys = Observation("keys")
    try:
        columns = ("adata_id", "content_hash", "cells", "copies", "known", "sample_id", "sample", "ingested_at")
        pending: pd.DataFrame = found.observe(keys, *_told()).where("NOT done").select(*columns).toPandas()
        told = keys.get
        if told["undecided"]:
            return None
        if told["nameless"]:
            raise ConfigError(f"{name} has rows without adata_id: give each row a key")
        if told["ambiguous"]:
            raise ConfigError(
                f"{name} has {told['ambiguous']} adata_id with several contents or samples, first {told['first']!r}: "
                "give each row a key of its own"
            )
        if told["in_samples"]:
            _refuse_clashes(found, name)
    finally:
        found.unpersist()
    pending = pending.sort_values(["cells", "adata_id"], ascending=[False, True], ignore_index=True)
    pending = pending.astype({"ingested_at": "Int64"})
    return PendingRows(int(told["rows"]), pending)


def _refuse_clashes(found: DataFrame, name: str) -> None:
    """Refuse a sample_id that is the adata_id of a row outside the sample: both would write lines of one key."""
    samples = found.select(F.col("sample_id").alias("id")).dropna().distinct()
    other = samples.join(found, (F.col("id") == F.col("adata_id")) & ~F.col("id").eqNullSafe(F.col("sample_id")))
    clash = other.select(F.min("id")).first()
    if clash and clash[0] is not None:
        raise ConfigError(
            f"{name}: {clash[0]!r} is the sample_id of some rows and the adata_id of a row outside that sample: "
            "rename the sample or the row"
        )


def _told() -> list[Column]:
    """What the keys are like: how many rows, and what is wrong with them."""
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
    """Each adata_id with its size, content, sample and whether it has a result."""
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
    """A row's n_obs, of which waves and tasks are cut; the row is not read for it, so it may be anything."""
    stated = F.when(F.col("n_obs").between(0, MOST_CELLS), F.col("n_obs"))
    return F.coalesce(stated, F.lit(ROW_CELLS_UNKNOWN)).cast("bigint")


def n_tasks(wave: pd.DataFrame) -> int:
    """How many tasks a wave makes."""
    return min(max(-(-int(wave["cells"].sum()) // TASK_CELLS), LEAST_TASKS), len(wave))


def with_tasks(spark: SparkSession, wave: pd.DataFrame) -> DataFrame:
    """Give each row of a wave to a task, as adata_id and task: the largest first, always to the emptiest.

    `repartition(n, "task")` with n = `n_tasks` brings each task's rows into a partition of its own: the numbers are
    chosen so that Spark's hash sends them to different ones.
    """
    n = n_tasks(wave)
    keys = spark.range(32 * n).groupBy(F.pmod(F.hash("id"), F.lit(n)).alias("slot")).agg(F.min("id").alias("key"))
    tasks = [(0, row["key"]) for row in keys.orderBy("slot").collect()]
    given = []
    for cells in wave["cells"]:  # largest first
        filled, slot = heapq.heappop(tasks)
        given.append(slot)
        heapq.heappush(tasks, (filled + int(cells), slot))
    return spark.createDataFrame(pd.DataFrame({"adata_id": wave["adata_id"], "task": given}))

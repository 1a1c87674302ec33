"""Samples of several rows on Spark: preprocessing decisions before the rows are embedded, means afterwards.

    decided = decisions(rows, work)                                     # sample_id, decisions
    rows.join(F.broadcast(decided), "sample_id")                        # each row gets its sample's decisions
        .mapInArrow(...)                                                # embed; contextual mode with `sums`
        .transform(means)                                               # contextual mode: one mean per sample and gene

Rows are never collected on one machine: tasks exchange genes × batches numbers per sample, and later genes × width.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from scgpt_batch.errors import RowError
from scgpt_batch.inference.sample_rows import statistics
from scgpt_batch.io.rows import PAYLOAD_COLUMNS, arrow_rows
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.sample_selection import Decisions
from scgpt_batch.preprocessing.sample_statistics import Statistics, decide, merge, passes
from scgpt_batch.spark.isolation import isolates, results_alone
from scgpt_batch.spark.worker import VECTOR, Batches, WorkerTask, list_array, watched, with_its_decisions
from scgpt_batch.spark.workers import computed

SAMPLES_AT_ONCE = 8  # whose sums a task keeps in memory to add further rows: a few MB each
GENE_SHARES = 64  # parts for a sample's means, so that no task gets all of its rows × genes

PARTS = pa.schema([("sample_id", pa.string()), ("statistics", pa.binary()), ("decisions", pa.binary())])
DECISIONS = pa.schema([("sample_id", pa.string()), ("decisions", pa.binary())])
MEANS = pa.schema(
    [
        ("sample_id", pa.string()), ("group", pa.string()), ("gene", pa.string()), ("n_cells", pa.int32()),
        ("embedding", VECTOR),
    ]
)  # fmt: skip


def decisions(rows: DataFrame, work: WorkerTask) -> DataFrame:
    """Return which genes each sample keeps, as scanpy would decide on all its cells: `DECISIONS`, a line per sample.

    Reads the rows once per pass (`passes`). Between passes the decisions are collected on the driver: about 10 bytes
    per gene and sample, for any number of cells. Rows that crash or never end are left out.

    Parameters
    ----------
    rows
        `adata_rows` whose `sample_id` is never null.
    """
    decided: DataFrame | None = None
    for _ in range(passes(work.parameters)):
        prepared = rows.withColumn("decisions", F.lit(None).cast("binary"))
        if decided is not None:
            prepared = rows.join(F.broadcast(decided), "sample_id")
        columns = [name for name in (*PAYLOAD_COLUMNS, "n_obs", "n_vars", "x_dtype") if name in rows.columns]
        collected = computed(
            rows.sparkSession,
            partial(_parts, prepared.select("sample_id", "decisions", *columns), work),
            partial(_decided, work),
            "decisions of samples",
        )
        decided = rows.sparkSession.createDataFrame(collected)
    assert decided is not None
    return decided


def _parts(rows: DataFrame, work: WorkerTask, isolated: bool) -> DataFrame:
    return rows.mapInArrow(contributions(replace(work, isolated=isolated)), from_arrow_schema(PARTS))


def _decided(work: WorkerTask, parts: DataFrame) -> pa.Table:
    return parts.groupBy("sample_id").applyInArrow(decider(work.parameters), from_arrow_schema(DECISIONS)).toArrow()


def means(sums: DataFrame) -> DataFrame:
    """Return each sample's means over all cells, computed from the contextual sums of its rows: `MEANS`.

    Parameters
    ----------
    sums
        sample_id, adata_id, group, gene, n_cells and embedding, which holds the sum over the row's cells.
    """
    share = F.pmod(F.xxhash64("gene"), F.lit(GENE_SHARES))
    columns = ("sample_id", "adata_id", "group", "gene", "n_cells", "embedding")
    return sums.select(*columns).groupBy("sample_id", share).applyInArrow(_means, from_arrow_schema(MEANS))


def contributions(work: WorkerTask) -> Callable[[Batches], Batches]:
    """Return a function for `mapInArrow` that sums the statistics of a task's rows by sample."""

    def run(batches: Batches) -> Batches:
        rows: deque[dict[str, Any]] = deque()
        sums: dict[str, Statistics] = {}
        decided: dict[str, bytes | None] = {}
        for part in _statistics(work, _remembered(batches, rows)):
            row = rows.popleft()
            sample = row["sample_id"]
            sums[sample] = merge([sums.pop(sample, Statistics()), part])
            decided[sample] = row["decisions"]
            if len(sums) > SAMPLES_AT_ONCE:
                oldest = next(iter(sums))
                yield _part(oldest, sums.pop(oldest), decided.pop(oldest))
        for sample, part in sums.items():
            yield _part(sample, part, decided[sample])

    return run


def _remembered(batches: Batches, rows: deque[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for row in arrow_rows(batch):
            rows.append({name: row[name] for name in ("sample_id", "decisions")})
            yield row


def _statistics(work: WorkerTask, rows: Iterator[dict[str, Any]]) -> Iterator[Statistics]:
    """Yield each row's statistics; empty ones for rows that killed their process or timed out."""
    if not (work.isolated or isolates()):
        return watched(map(statistics_of_row(work), rows), work.row_timeout)
    results = results_alone(rows, partial(statistics_of_row, work), work.row_timeout)
    return (Statistics(left_out=1) if isinstance(result, RowError) else result for result in results)


def statistics_of_row(work: WorkerTask) -> Callable[[dict[str, Any]], Statistics]:
    """Return a function that computes a row's statistics, in the process that has loaded the model."""
    reader = work.model.load().reader

    def of_row(row: dict[str, Any]) -> Statistics:
        row, decisions = with_its_decisions(row)
        return statistics(reader, row, work.parameters, decisions)

    return of_row


def decider(parameters: Parameters) -> Callable[[pa.Table], pa.Table]:
    """Return a function for `applyInArrow` that sums a sample's parts and makes its next decisions."""

    def run(parts: pa.Table) -> pa.Table:
        before = parts["decisions"][0].as_py()
        together = merge(Statistics.from_bytes(part.as_py()) for part in parts["statistics"])
        decided = decide(together, parameters, None if before is None else Decisions.from_bytes(before))
        return pa.Table.from_pylist(
            [{"sample_id": parts["sample_id"][0].as_py(), "decisions": decided.to_bytes()}], DECISIONS
        )

    return run


def _part(sample: str, sums: Statistics, decided: bytes | None) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(
        [{"sample_id": sample, "statistics": sums.to_bytes(), "decisions": decided}], PARTS
    )


def _means(lines: pa.Table) -> pa.Table:
    """Return the means of each group and gene, summed in float64 in the order of the rows' ids."""
    lines = lines.sort_by([(name, "ascending") for name in ("group", "gene", "adata_id")])
    n_cells = lines["n_cells"].to_numpy()
    sums = lines["embedding"].combine_chunks().flatten().to_numpy().reshape(len(n_cells), -1).astype(np.float64)
    keys = lines.select(["group", "gene"]).to_pandas()
    starts = np.flatnonzero(~keys.duplicated().to_numpy())
    cells = np.add.reduceat(n_cells.astype(np.int64), starts)
    first = lines.take(starts)
    return pa.table(
        {
            "sample_id": first["sample_id"],
            "group": first["group"],
            "gene": first["gene"],
            "n_cells": cells,
            "embedding": list_array(np.add.reduceat(sums, starts) / cells[:, None]),
        },
        MEANS,
    )

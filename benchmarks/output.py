"""MB/s of vectors into Delta, in each layout, beside pyarrow writing the same vectors to Parquet by itself."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from figures import WORK, say
from pyspark.sql import SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from scgpt_batch.spark import tables
from scgpt_batch.spark.session import get_spark
from scgpt_batch.spark.worker import ANSWERS, list_array

EMBSIZE, LINES = 512, 153_600  # 128 rows of 1,200 genes
WARM_UPS, RUNS = 10, 5  # until some ten runs the JVM compiles Spark's planner beside the writer, on the same cores
LAYOUTS = {
    "contextual": "adata_id STRING, gene STRING, embedding ARRAY<FLOAT>, n_cells INT",
    "cell": "adata_id STRING, cell_id STRING, embedding ARRAY<FLOAT>",
}


def run() -> dict[str, object]:
    """MB/s of vectors into Delta, in each layout; the ceiling first."""
    megabytes = LINES * EMBSIZE * 4 / 1e6
    ceiling = megabytes / _pyarrow_seconds()
    say(f"ceiling: pyarrow alone {ceiling:.0f} MB/s")
    spark, found = get_spark({"spark.master": "local[2]"}), {}
    for name, schema in LAYOUTS.items():
        seconds = _delta_seconds(spark, name, schema)
        say(f"{name}: {megabytes / seconds:.0f} MB/s")
        found[name] = {
            "ours": round(megabytes / seconds, 1),
            "share_of_ceiling": round(megabytes / seconds / ceiling, 3),
        }
    spark.stop()
    return found


def _pyarrow_seconds() -> float:
    buffer = np.random.default_rng(0).standard_normal((1200, EMBSIZE), dtype=np.float32)
    batch, path = pa.table({"embedding": list(buffer)}), WORK / "ceiling.parquet"
    WORK.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with pq.ParquetWriter(path, batch.schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(LINES // 1200):
            writer.write_table(batch)
    taken = time.perf_counter() - started
    path.unlink()
    return taken


def _delta_seconds(spark: SparkSession, name: str, schema: str) -> float:
    """The median of `RUNS`, after `WARM_UPS` that do not count."""
    out = WORK / f"output_{name}"
    columns = pa.schema([ANSWERS.field(column.split()[0]) for column in schema.split(", ")])

    def answers(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        buffer = np.random.default_rng(0).standard_normal((1200, EMBSIZE), dtype=np.float32)
        filled = {"embedding": list_array(buffer), "n_cells": pa.array([7] * 1200, pa.int32())}
        names = pa.array([f"NAME{i:05d}" for i in range(1200)])
        lines = pa.RecordBatch.from_arrays([filled.get(name, names) for name in columns.names], schema=columns)
        for batch in batches:
            yield from [lines] * batch.num_rows

    tables.create(spark, f"delta.`{out}`", schema)
    taken = []
    for _ in range(WARM_UPS + RUNS):
        lines = spark.range(LINES // 1200, numPartitions=2).mapInArrow(answers, from_arrow_schema(columns))
        started = time.perf_counter()
        lines.write.format("delta").option("compression", "zstd").mode("overwrite").save(str(out))
        taken.append(time.perf_counter() - started)
    shutil.rmtree(out)
    return statistics.median(taken[WARM_UPS:])

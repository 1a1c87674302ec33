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

from scgpt_batch.spark.session import get_spark

EMBSIZE, LINES = 512, 153_600  # 128 rows of 1,200 genes
LAYOUTS = {
    "contextual": "adata_id string, gene string, embedding array<float>, n_cells int",
    "cell": "adata_id string, cell_id string, embedding array<float>",
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
    """The median of three, after three that do not count: the JVM compiles its writer until then."""
    out, columns = WORK / f"output_{name}", [field.split()[0] for field in schema.split(", ")]

    def answers(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        # written out: workers know nothing of this folder
        ends = np.arange(0, 1200 * EMBSIZE + 1, EMBSIZE, dtype=np.int32)
        buffer = np.random.default_rng(0).standard_normal(1200 * EMBSIZE, dtype=np.float32)
        vectors = pa.ListArray.from_arrays(ends, pa.array(buffer))
        filled = {"embedding": vectors, "n_cells": pa.array([7] * 1200, pa.int32())}
        names = pa.array([f"NAME{i:05d}" for i in range(1200)])
        for batch in batches:
            for _ in range(batch.num_rows):
                yield pa.RecordBatch.from_arrays([filled.get(column, names) for column in columns], columns)

    taken = []
    for _ in range(6):
        lines = spark.range(LINES // 1200, numPartitions=2).mapInArrow(answers, schema)
        started = time.perf_counter()
        lines.write.format("delta").option("compression", "zstd").mode("overwrite").save(str(out))
        taken.append(time.perf_counter() - started)
    shutil.rmtree(out)
    return statistics.median(taken[3:])

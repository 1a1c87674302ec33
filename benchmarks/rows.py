"""Many small rows: rows/s of the job, and the seconds of a run that finds nothing to do, up to a million rows.

A row is 3 real cells × 100 genes; static mode, a small checkpoint: what is left is the cost of a row. Each run is the
command in a process of its own, JVM and imports included in `wall`. The ceiling is the embedder on the same rows in
this process, on one core, times the cores. The million rows are made up, with a ledger that knows them all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from delta_session import delta_session
from figures import PBMC, WORK, say
from job_runs import AS_COUNTED, COMMAND, checkpoint_of, register
from pbmc_rows import cell_rows, read_cells, to_arrow
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from scgpt_batch.inference.engine import load_embedder
from scgpt_batch.parameters import Parameters
from scgpt_batch.spark.tables import content_hash

SIZES = (1_000, 10_000, 100_000)
IDLE = 1_000_000
DIFFERENT = 1_000  # rows; larger tables repeat their contents under other keys
CHECKPOINT = {"embsize": 64, "d_hid": 64, "nlayers": 2, "nheads": 4}
SET = {"mode": "static"} | dict(pair.split("=") for pair in AS_COUNTED)


def run(sizes: tuple[int, ...] = SIZES, idle: int = IDLE) -> dict[str, object]:
    """Rows/s and seconds of an idle run at each size, then of an idle run over many more."""
    checkpoint = checkpoint_of("small", CHECKPOINT)
    rows = to_arrow(list(cell_rows(read_cells(PBMC, n_genes=100), n_rows=DIFFERENT, n_cells=3)), "csr")
    ceiling = _embedder_alone(checkpoint, rows.to_pylist()) * (os.cpu_count() or 1)
    say(f"ceiling: the embedder alone, on all cores, {ceiling:.0f} rows/s")
    store, environment = register(checkpoint)
    found: dict[str, object] = {"ceiling_rows_per_s": round(ceiling)}
    for n in sizes:
        _write_rows(rows, n)
        done, _ = _command(store, environment, n)
        again, wall = _command(store, environment, n)
        rate = n / done["seconds"]
        say(f"{n} rows: {rate:.0f} rows/s; nothing to do: {again['seconds']:.1f} s, {wall:.1f} s with the process")
        found[str(n)] = {"rows_per_s": round(rate, 1), "share_of_ceiling": round(rate / ceiling, 3),
                         "seconds": done["seconds"], "idle_seconds": again["seconds"], "idle_wall": wall}  # fmt: skip
    _make_up(idle, like=sizes[0])
    summary, wall = _command(store, environment, idle)
    if summary["rows_skipped"] != idle:
        raise SystemExit(f"the idle run took {idle - summary['rows_skipped']} unchanged rows for new ones")
    say(f"{idle} rows, nothing to do: {summary['seconds']:.1f} s, {wall:.1f} s with the process (aim: 60)")
    return found | {str(idle): {"idle_seconds": summary["seconds"], "idle_wall": wall}}


def _embedder_alone(checkpoint: Path, rows: list[dict]) -> float:
    embedder, parameters = load_embedder(checkpoint), Parameters.create(SET)
    next(embedder.embed_rows(rows[:1], parameters, with_vectors=False))
    started = time.perf_counter()
    for answer in embedder.embed_rows(rows, parameters, with_vectors=False):
        if answer.error:
            raise SystemExit(f"a row failed: {answer.error}")
    return len(rows) / (time.perf_counter() - started)


def _command(store: Path, environment: dict[str, str], n: int) -> tuple[dict, float]:
    """Embed the table of n rows; the command's summary and its seconds from start to end."""
    words = [COMMAND, "embed", "--model-uri", "models:/bench/1"]
    words += ["--input-table", f"delta.`{WORK}/rows_{n}`", "--output-table", f"delta.`{WORK}/rows_{n}_out`"]
    for name, value in SET.items():
        words += [f"--{name.replace('_', '-')}", value]
    started = time.perf_counter()
    done = subprocess.run(
        list(map(str, words)), cwd=store, env=environment, check=True, text=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout.strip().splitlines()[-1]), round(time.perf_counter() - started, 1)


def _write_rows(rows: pa.Table, n: int) -> None:
    """A table of n rows: those given, as often as it takes."""
    with _session(n) as spark:
        copies = spark.range(n // DIFFERENT, numPartitions=8).select(F.format_string("%06d", "id").alias("copy"))
        keyed = copies.crossJoin(F.broadcast(spark.createDataFrame(rows)))
        keyed = keyed.withColumns({"adata_id": F.concat_ws("-", "copy", "adata_id"), "content_hash": content_hash()})
        keyed.drop("copy").write.format("delta").save(f"{WORK}/rows_{n}")


def _make_up(n: int, like: int) -> None:
    """A table of n rows with payload, and a ledger that knows them all, stamped as the run over `like` rows was."""
    with _session(n) as spark:
        keys = spark.range(n).select(
            F.concat(F.lit("row-"), "id").alias("adata_id"), F.md5(F.col("id").cast("string")).alias("content_hash")
        )
        payload = spark.read.format("delta").load(f"{WORK}/rows_{like}").drop("adata_id", "content_hash").limit(1)
        keys.crossJoin(F.broadcast(payload)).write.format("delta").save(f"{WORK}/rows_{n}")
        lines = spark.read.format("delta").load(f"{WORK}/rows_{like}_out_ledger")
        stamps = lines.drop("adata_id", "content_hash").limit(1)
        keys.crossJoin(F.broadcast(stamps)).write.format("delta").save(f"{WORK}/rows_{n}_out_ledger")


@contextmanager
def _session(n: int) -> Iterator[SparkSession]:
    """Spark, without the tables that an earlier call has left for n rows."""
    for suffix in ("", "_out", "_out_ledger", "_out_runs"):
        shutil.rmtree(WORK / f"rows_{n}{suffix}", ignore_errors=True)
    spark = delta_session("rows")
    try:
        yield spark
    finally:
        spark.stop()

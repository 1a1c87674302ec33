"""The blog's wrapper against ours: seconds a row, Delta to Delta, on two cores of one machine.

Regime: rows of 500 real cells x 3,000 genes (PBMC3k, log-normalised, other cells in each row), static mode,
a random checkpoint of the published size. The blog's side gets few rows in the dense format that it reads
(blog_wrapper.py, in the environment of the real scgpt 0.2.4); ours gets many, in CSR, through the command
line. Row i holds the same cells on both sides, so their answers are compared too.

Timing: both sides warm, what one more row of a long table costs. The blog's is read -> UDF -> write alone on
workers that have answered before. Ours is what the `embed` job says of itself, the median of five runs in a session
that has done four before (embed_cold_warm.py): so long the JVM goes on compiling beside the work. The first of those,
whose workers import and load inside the timed span and whose JVM has compiled nothing, is `ours_cold_s_per_row`;
`our_runs_s` tells all nine. Seconds a row are elapsed seconds over rows, with both cores at work.

The ceiling is the same amount of floats written to Delta from one Arrow buffer, with no model in between.

    .venv/bin/python benchmarks/blog.py [--blog-rows 8] [--our-rows 200] [--our-format csr|dense]

Everything is kept below .cache/bench-blog (4 GB free space will do). The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from delta_session import delta_session
from full_size_checkpoint import write_checkpoint
from pbmc_rows import Format, cell_rows, gene_names, read_cells, to_arrow
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from worker_memory import WorkerMemory

from scgpt_batch.spark.tables import content_hash

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".cache" / "bench-blog"
PBMC = ROOT / "tests" / "data" / "pbmc3k.h5ad"
UPSTREAM_PYTHON = ROOT / ".venv-upstream" / "bin" / "python"
COMMAND = Path(sys.executable).parent / "scgpt-batch"

N_CELLS, N_GENES = 500, 3000
GENES_OUT, EMBSIZE = 1200, 512  # what one row's answer holds: 2.5 MB of floats
WARM_UP, WARM_RUNS = 3, 5  # of ours, after the cold one
ROWS_A_FILE: dict[Format, int] = {"dense": 1, "csr": 25}  # 12 MB a row and 2 MB a row in memory


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- what both sides read -------------------------------------------------------------------------


def make_checkpoint(folder: Path) -> Path:
    """A random checkpoint whose vocabulary holds all gene names of the cells; reused when complete."""
    if not (folder / "args.json").exists():
        say(f"making a random checkpoint of full size in {folder}")
        write_checkpoint(folder, genes=gene_names(PBMC))
    return folder


def write_rows(spark: SparkSession, table: Path, *, n_rows: int, fmt: Format) -> int:
    """Write `n_rows` rows as a Delta table, some rows a file; return its size in bytes."""
    shutil.rmtree(table, ignore_errors=True)
    rows = cell_rows(read_cells(PBMC, n_genes=N_GENES), n_rows=n_rows, n_cells=N_CELLS)
    while batch := list(islice(rows, ROWS_A_FILE[fmt])):
        frame = spark.createDataFrame(to_arrow(batch, fmt)).coalesce(1)
        frame = frame.withColumns({"x_dtype": F.lit(None).cast("string")}).withColumn(
            "content_hash", content_hash()
        )  # as ingest writes it
        frame.write.format("delta").mode("append").save(str(table))
    return table_bytes(table)


def table_bytes(table: Path) -> int:
    return sum(file.stat().st_size for file in table.glob("*.parquet"))


def write_tables(args: argparse.Namespace) -> dict[str, float]:
    """The blog's rows and ours; MB a row on disk of each."""
    spark = delta_session("tables")
    wanted = {"blog_rows": (args.blog_rows, "dense"), "our_rows": (args.our_rows, args.our_format)}
    sizes = {}
    for name, (n_rows, fmt) in wanted.items():
        size = write_rows(spark, WORK / name, n_rows=n_rows, fmt=fmt) / 1e6
        say(f"{name}: {n_rows} rows, {fmt}, {size:.1f} MB on disk, {size / n_rows:.2f} MB a row")
        sizes[name] = round(size / n_rows, 3)
    spark.stop()
    return {"blog_mb_per_row": sizes["blog_rows"], "our_mb_per_row": sizes["our_rows"]}


# --- the two sides --------------------------------------------------------------------------------


def empty_folder(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def call(command: Sequence[str | Path], store: Path) -> dict[str, object]:
    """Run a command that keeps MLflow's files in `store`; return the JSON document of its last line.

    Wall seconds and the peak memory of a worker are added. Its standard error goes through; a failure ends
    the benchmark.
    """
    environment = os.environ | {
        "SPARK_LOCAL_IP": "127.0.0.1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{store / 'mlflow.db'}",
    }
    started = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), cwd=store, env=environment, text=True, stdout=subprocess.PIPE)
    with process, WorkerMemory(process.pid) as memory:
        output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with code {process.returncode}")
    result = json.loads(output.strip().splitlines()[-1])
    measured = {"wall_seconds": time.perf_counter() - started, "worker_peak_mb": round(memory.peak_mb)}
    return result | measured


def run_blog(checkpoint: Path, n_rows: int) -> dict[str, object]:
    """The blog's wrapper over the dense rows, in the upstream environment."""
    store = empty_folder(WORK / "blog_mlflow")
    out = WORK / "blog_embeddings"
    shutil.rmtree(out, ignore_errors=True)
    script = Path(__file__).parent / "blog_wrapper.py"
    tables = ["--rows-table", WORK / "blog_rows", "--out", out]
    say(f"the blog's wrapper over {n_rows} rows")
    result = call([UPSTREAM_PYTHON, script, *tables, "--checkpoint", checkpoint, "--store", store], store)
    expect_rows(result["rows"], n_rows)
    return result


def run_ours(checkpoint: Path, n_rows: int) -> dict[str, object]:
    """Register the checkpoint, then embed all rows cold and warm, each time into fresh tables."""
    store = empty_folder(WORK / "our_mlflow")
    say("registering the checkpoint")
    registered = call([COMMAND, "register", "--checkpoint", checkpoint, "--name", "scgpt_bench"], store)
    say(f"our job over {n_rows} rows, cold, then {WARM_UP} + {WARM_RUNS} times")
    script = Path(__file__).parent / "embed_cold_warm.py"
    tables = ["--rows", WORK / "our_rows", "--out", WORK / "our_embeddings"]
    runs = ["--warm-up", WARM_UP, "--warm-runs", WARM_RUNS]
    result = call([sys.executable, script, "--model-uri", str(registered["model_uri"]), *tables, *runs], store)
    for run in ("cold", "warm"):
        expect_rows(result[run]["rows_ok"], n_rows)
    return result


def expect_rows(answered: object, n_rows: int) -> None:
    if answered != n_rows:
        raise SystemExit(f"{answered} of {n_rows} rows were answered")


# --- do they say the same -------------------------------------------------------------------------


def compare(blog: DataFrame, ours: DataFrame) -> dict[str, object]:
    """Columns, genes of each row that both have, and the vectors of the genes that both answer with."""
    keys = ["adata_id", "gene"]
    ours = ours.join(blog.select("adata_id").distinct(), "adata_id", "left_semi")
    pairs = blog.select(*keys, F.col("embedding").alias("theirs")).join(ours.select(*keys, "embedding"), keys)
    difference = F.array_max(F.transform(F.arrays_zip("theirs", "embedding"), _abs_difference))
    found = pairs.select(F.count("*").alias("shared"), F.max(difference).alias("difference")).first()
    n_blog, n_ours = blog.count(), ours.count()
    return {
        "same_columns": _columns(blog) == _columns(ours),
        "blog_genes": n_blog,
        "our_genes": n_ours,
        "shared_genes_fraction": round(found["shared"] / max(n_blog, n_ours), 4),
        "max_abs_difference": found["difference"],
    }


def _abs_difference(pair):
    return F.abs(pair["theirs"] - pair["embedding"])


def _columns(table: DataFrame) -> list[tuple[str, str]]:
    return [(field.name, field.dataType.simpleString()) for field in table.schema]


def check(spark: SparkSession) -> dict[str, object]:
    tables = [spark.read.format("delta").load(str(WORK / f"{side}_embeddings")) for side in ("blog", "our")]
    result = compare(*tables)
    say(f"do they agree: {result}")
    return result


# --- the ceiling ----------------------------------------------------------------------------------


def answers_from_one_buffer(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """For each row id one answer of 1,200 x 512 floats, all from one buffer drawn once a task."""
    buffer = np.random.default_rng(0).standard_normal(GENES_OUT * EMBSIZE, dtype=np.float32)
    ends = pa.array(np.arange(GENES_OUT + 1, dtype=np.int32) * EMBSIZE)
    vectors = pa.ListArray.from_arrays(ends, pa.array(buffer))
    genes = pa.array([f"GENE{i:05d}" for i in range(GENES_OUT)])
    for batch in batches:
        for i in batch.column("id").to_pylist():
            ids = pa.array([f"row-{i:04d}"] * GENES_OUT)
            yield pa.RecordBatch.from_arrays([ids, genes, vectors], ["adata_id", "gene", "embedding"])


def ceiling_seconds(spark: SparkSession, n_rows: int) -> float:
    """Seconds a row to write answers that cost nothing to compute, on the same two cores; the better of two."""
    out = WORK / "ceiling"
    schema = "adata_id string, gene string, embedding array<float>"

    def write(rows: int) -> float:
        answers = spark.range(rows, numPartitions=2).mapInArrow(answers_from_one_buffer, schema)
        started = time.perf_counter()
        answers.write.format("delta").mode("overwrite").save(str(out))
        return time.perf_counter() - started

    shutil.rmtree(out, ignore_errors=True)
    write(4)  # untimed: compiles the plan, starts the workers
    seconds = min(write(n_rows), write(n_rows)) / n_rows
    shutil.rmtree(out)
    megabytes = GENES_OUT * EMBSIZE * 4 / 1e6
    say(f"ceiling: {seconds:.4f} s a row, {megabytes / seconds:.0f} MB/s of floats into Delta")
    return seconds


# --- the figures ----------------------------------------------------------------------------------


def blog_figures(result: dict[str, object], n_rows: int) -> dict[str, float]:
    return {
        "blog_rows": n_rows,
        "blog_s_per_row": round(result["seconds"] / n_rows, 3),
        "blog_wall_s_per_row": round(result["wall_seconds"] / n_rows, 3),
        "blog_worker_peak_mb": result["worker_peak_mb"],
    }


def our_figures(result: dict[str, object], n_rows: int) -> dict[str, object]:
    return {
        "our_rows": n_rows,
        "ours_s_per_row": round(result["warm"]["seconds"] / n_rows, 4),
        "ours_cold_s_per_row": round(result["cold"]["seconds"] / n_rows, 4),
        "our_runs_s": result["seconds"],
        "worker_peak_mb": result["worker_peak_mb"],
    }


def ratios(figures: dict[str, float]) -> dict[str, float]:
    """How many times less a row takes with ours; our share of the ceiling."""
    ratio = figures["blog_s_per_row"] / figures["ours_s_per_row"]
    cold = figures["blog_s_per_row"] / figures["ours_cold_s_per_row"]
    share = figures["ceiling_s_per_row"] / figures["ours_s_per_row"]
    return {"ratio": round(ratio, 1), "ratio_cold": round(cold, 1), "share_of_ceiling": round(share, 3)}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The blog's wrapper against ours, seconds a row.")
    parser.add_argument("--blog-rows", type=int, default=8, help="dense rows for the blog's wrapper, 5 to 10 s each")
    parser.add_argument("--our-rows", type=int, default=200, help="rows for ours")
    parser.add_argument("--our-format", choices=("csr", "dense"), default="csr", help="format of our rows")
    parser.add_argument("--side", choices=("both", "blog", "ours"), default="both", help="run one side alone")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    WORK.mkdir(parents=True, exist_ok=True)
    checkpoint = make_checkpoint(WORK / "checkpoint")
    figures: dict[str, object] = {"machine": platform.platform(), "cores": os.cpu_count()}
    figures |= {"cells_per_row": N_CELLS, "genes_per_row": N_GENES, "our_format": args.our_format}
    figures |= write_tables(args)
    if args.side != "ours":
        figures |= blog_figures(run_blog(checkpoint, args.blog_rows), args.blog_rows)
    if args.side != "blog":
        figures |= our_figures(run_ours(checkpoint, args.our_rows), args.our_rows)
    spark = delta_session("figures")
    figures["ceiling_s_per_row"] = round(ceiling_seconds(spark, args.our_rows), 4)
    if args.side == "both":
        figures |= check(spark) | ratios(figures)
    spark.stop()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

"""Label transfer, gene programs, nearest genes in SQL and the report at scale.

`.venv/bin/python benchmarks/analysis.py [--only neighbours,programs,sql,report] [--reference N] [--queries N]
[--genes N] [--cells N]`
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
from deltalake import write_deltalake
from sklearn.neighbors import NearestNeighbors

from scgpt_batch.analysis.annotate import QUERY_BLOCK, REFERENCE_BLOCK, nearest_cells

D, K = 512, 10
REPEATS = 5  # of a query in a warm session, and before it, so that its code is compiled
SQL = Path(__file__).parents[1] / "examples" / "sql" / "similar_genes.sql"


def blocks(n: int) -> Iterator[np.ndarray]:
    """Yield n reference vectors without holding them all; every block differs."""
    base = np.random.default_rng(0).standard_normal((REFERENCE_BLOCK, D)).astype(np.float32)
    for i, first in enumerate(range(0, n, REFERENCE_BLOCK)):
        yield np.roll(base, i, axis=1)[: n - first]


def neighbours(n_reference: int, n_queries: int) -> dict[str, float]:
    query = np.random.default_rng(1).standard_normal((n_queries, D)).astype(np.float32)
    block = next(blocks(REFERENCE_BLOCK))
    part = query[:QUERY_BLOCK]
    part @ block.T
    start = time.perf_counter()
    for _ in range(5):
        part @ block.T
    flops = 2 * len(part) * len(block) * D * 5 / (time.perf_counter() - start)
    start = time.perf_counter()
    nearest_cells(query, blocks(n_reference), K)
    seconds = time.perf_counter() - start
    sample, reference = query[:200], np.concatenate(list(blocks(100_000)))
    found = nearest_cells(sample, reference, K).index
    search = NearestNeighbors(n_neighbors=K, metric="cosine", algorithm="brute").fit(reference)
    exact = search.kneighbors(sample, return_distance=False)
    recall = np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, exact, strict=True)])
    return {
        "reference_cells": n_reference, "query_cells": n_queries, "seconds": round(seconds, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
        "gemm_gflops": round(flops / 1e9, 1),
        "share_of_gemm": round(2 * n_reference * n_queries * D / flops / seconds, 2), "recall": float(recall),
    }  # fmt: skip


def programs(n_genes: int) -> dict[str, float]:
    from scgpt_batch.analysis.programs import find_programs

    x, _ = clusters(n_genes, n_genes // 30)
    start = time.perf_counter()
    table = find_programs(pd.DataFrame(x, index=[f"G{i}" for i in range(n_genes)]))
    return {
        "genes": n_genes, "programs": int(table["program"].nunique()), "seconds": round(time.perf_counter() - start, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
    }  # fmt: skip


def clusters(n: int, n_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Return vectors in clusters, and the cluster of each."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((n_clusters, D)).astype(np.float32)
    of = rng.integers(n_clusters, size=n)
    return centers[of] + rng.standard_normal((n, D), dtype=np.float32), of


def write_embeddings(folder: Path, kind: str, vectors: np.ndarray, mode: str) -> str:
    """Write an embedding table of two files; return its path."""
    n = len(vectors)
    ends = np.arange(0, n * D + 1, D, dtype=np.int32)
    columns = {
        "adata_id": ["row"] * n, kind: [f"{kind}{i}" for i in range(n)],
        "embedding": pa.ListArray.from_arrays(ends, vectors.ravel()),
        "embedded_at": pa.array([datetime.now(UTC)] * n, pa.timestamp("us", "UTC")),
    }  # fmt: skip
    if kind == "gene":
        columns |= {"group": pa.nulls(n, pa.string()), "n_cells": pa.array([3] * n, pa.int32())}
    stamps = {"mode": mode, "model_name": "scgpt", "model_version": "1", "params_hash": "p", "run_id": "r"}
    table = pa.table(columns | {name: [value] * n for name, value in stamps.items()})
    path = str(folder / f"{kind}s")
    for part in (table.slice(0, n // 2), table.slice(n // 2)):
        write_deltalake(path, part, mode="append")
    return path


def sql(n_genes: int, folder: Path) -> dict[str, Any]:
    """Find nearest genes by SQL alone, in a warm session on two cores, beside a bare scan of the vectors."""
    from scgpt_batch.spark.session import get_spark

    path = write_embeddings(folder, "gene", clusters(n_genes, n_genes // 30)[0], "static")
    spark = get_spark({"spark.master": "local[2]"})
    spark.sql(f"create or replace temporary view genes as select * from delta.`{path}`")
    query, scan = SQL.read_text(), "select sum(array_max(embedding)) from genes where mode = 'static'"
    queries: dict[str, Callable[[], object]] = {
        "query": lambda: spark.sql(query, args={"table": "genes", "gene": "gene5", "k": K}).collect(),
        "scan": lambda: spark.sql(scan).collect(),
    }
    java = psutil.Process().children(recursive=True)
    found: dict[str, Any] = {"genes": n_genes}
    for name, run in queries.items():
        for _ in range(REPEATS):
            run()
        seconds, start = [], sum(sum(process.cpu_times()[:2]) for process in java)
        for _ in range(REPEATS):
            before = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - before)
        found[f"{name}_seconds"] = round(float(np.median(seconds)), 2)
        cpu = sum(sum(process.cpu_times()[:2]) for process in java) - start
        found[f"{name}_cpu"] = round(cpu / REPEATS, 2)
    return found


def report(n_genes: int, n_cells: int, folder: Path) -> dict[str, Any]:
    """Write the page of `report`, the interpreter's start included."""
    cells, types = clusters(n_cells, 20)
    tables = [write_embeddings(folder, "cell_id", cells, "cell")]
    tables.append(write_embeddings(folder, "gene", clusters(n_genes, n_genes // 30)[0], "static"))
    labels = pd.DataFrame({"cell_type": [f"type {i}" for i in types]}, index=[f"cell_id{i}" for i in range(n_cells)])
    labels.rename_axis("cell_id").to_csv(folder / "cells.csv")
    page = folder / "report.html"
    words = ["--embeddings", *tables, "--obs", folder / "cells.csv", "--label-column", "cell_type", "--report", page]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = Path(sys.executable).with_name("scgpt-batch")
    subprocess.run([command, "report", *words], check=True, stdout=sys.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "genes": n_genes, "cells": n_cells, "seconds": round(time.perf_counter() - start, 1),
        "cpu": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_mb": round(after.ru_maxrss * 1024 / 1e6), "page_mb": round(page.stat().st_size / 1e6, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="neighbours,programs,sql,report")
    parser.add_argument("--reference", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--genes", type=int, default=60_000)
    parser.add_argument("--cells", type=int, default=100_000, help="of the report")
    args = parser.parse_args()
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "neighbours": lambda _: neighbours(args.reference, args.queries),
        "programs": lambda _: programs(args.genes),
        "sql": lambda folder: sql(args.genes, folder),
        "report": lambda folder: report(args.genes, args.cells, folder),
    }
    results = {}
    for name in args.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            results[name] = parts[name](Path(folder))
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()

"""Runs of the whole job for the benchmarks: tables of real cells, a registered checkpoint, cold and warm, memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from delta_session import delta_session
from figures import PBMC, ROOT, WORK
from full_size_checkpoint import write_checkpoint
from pbmc_rows import cell_rows, gene_names, read_cells, to_arrow
from pyspark.sql import functions as F
from worker_memory import WorkerMemory

from scgpt_batch.spark.tables import content_hash

COMMAND = Path(sys.executable).parent / "scgpt-batch"
AS_COUNTED = ("need_preprocess=false", "data_is_raw=false")  # rows of log values, no genes cut
N_GENES = 3000


def write_rows(name: str, n_rows: int, n_cells: int) -> Path:
    table = WORK / name
    shutil.rmtree(table, ignore_errors=True)
    spark = delta_session("rows")
    made = list(cell_rows(read_cells(PBMC, n_genes=N_GENES), n_rows=n_rows, n_cells=n_cells))
    frame = (
        spark.createDataFrame(to_arrow(made, "csr"))
        .withColumns({"x_dtype": F.lit(None).cast("string")})
        .withColumn("content_hash", content_hash())
    )
    frame.coalesce(2).write.format("delta").save(str(table))
    spark.stop()
    return table


def checkpoint_of(name: str, sizes: dict[str, int]) -> Path:
    folder = WORK / f"checkpoint_{name}"
    if not (folder / "args.json").exists():
        write_checkpoint(folder, genes=gene_names(PBMC), **sizes)
    return folder


def register(checkpoint: Path) -> tuple[Path, dict[str, str]]:
    """Register the checkpoint as models:/bench/1 in an MLflow store of its own; its folder, and how it is found."""
    store = WORK / "mlflow"
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir(parents=True)
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db", "SPARK_LOCAL_IP": "127.0.0.1"}
    words = [COMMAND, "register", "--checkpoint", checkpoint, "--name", "bench"]
    subprocess.run(words, cwd=store, env=environment, check=True, stdout=subprocess.DEVNULL)
    return store, environment


def embed(checkpoint: Path, rows: Path, mode: str) -> tuple[dict, dict[str, int]]:
    """Register the checkpoint, run the job cold and warm in a process of its own; its summaries, its peak memory."""
    store, environment = register(checkpoint)
    script = [sys.executable, ROOT / "benchmarks" / "embed_cold_warm.py", "--model-uri", "models:/bench/1"]
    script += ["--rows", rows, "--out", WORK / "embeddings", "--set", f"mode={mode}", *AS_COUNTED]
    process = subprocess.Popen(list(map(str, script)), cwd=store, env=environment, text=True, stdout=subprocess.PIPE)
    with process, WorkerMemory(process.pid) as memory:
        output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"embed_cold_warm.py ended with code {process.returncode}")
    peaks = {
        "worker_peak_mb": round(memory.peak_mb),
        "driver_peak_mb": round(memory.driver_peak_mb),
        "jvm_peak_mb": round(memory.jvm_peak_mb),
    }
    return json.loads(output.strip().splitlines()[-1]), peaks

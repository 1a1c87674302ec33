"""Where a cold command's time goes, and how near the commands are to what is unavoidable.

    make bench-start          # or: .venv/bin/python benchmarks/start.py --tries 5

Unavoidable for a command that needs Spark is a JVM with a Delta session: a process that imports pyspark, starts the
session with the settings of the commands, reads one small Delta table, and commits one row to another. Every process
is started several times in turn with the others, with files in the cache; the table shows medians of wall time and of
CPU time, that of the JVM and of Python workers included. On a busy machine only CPU times and ratios mean something.

The last line is one JSON document with the same figures.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
from deltalake import write_deltalake

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.helpers import small_rows

GOLDEN = Path(__file__).parents[1] / "tests/data/golden"
LIBRARIES = (
    "pandas",
    "pyarrow.dataset",
    "pydantic",
    "anndata",
    "scanpy",
    "numba",
    "torch",
    "mlflow",
    "pyspark.sql",
    "deltalake",
)
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: a JVM that outlives its command becomes our child
COMMAND = "from scgpt_batch.cli import entry_point; entry_point()"
SESSION = """
import json, os, sys, time
clock = time.perf_counter
start = clock()
from pyspark.sql import SparkSession
from scgpt_batch.spark.jars import local_conf
imported = clock()
os.environ["PYSPARK_PYTHON"] = sys.executable
conf = local_conf({}) | {"spark.submit.pyFiles": ""}
spark = SparkSession.builder.config(map=conf).getOrCreate()
session = clock()
spark.read.format("delta").load(sys.argv[1]).count()
read = clock()
spark.range(1).write.format("delta").save(sys.argv[2])
print(json.dumps({"pyspark imported": imported - start, "JVM and session": session - imported,
                  "first Delta read": read - session, "first Delta commit": clock() - read}))
"""


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    parser = argparse.ArgumentParser(description="Measure the start of the commands.")
    parser.add_argument("--tries", type=int, default=3, help="starts of each process; the median counts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args.tries)
    show(found)
    print(json.dumps(found))


def measure(folder: Path, tries: int) -> dict[str, dict[str, float]]:
    """Return seconds of the imports, of the parts of a bare session, and of whole processes."""
    rows, model = prepare(folder)
    embed = ["embed", "--model-uri", model, "--input-table", rows, "--need-preprocess", "false"]
    table = f"delta.`{folder}/out0`"
    processes: dict[str, Callable[[int], list[str]]] = {
        "bare Delta session": lambda i: [SESSION, f"{folder}/rows", f"{folder}/bare{i}"],
        "embed, 9 small rows": lambda i: [COMMAND, *embed, "--output-table", f"delta.`{folder}/out{i}`"],
        "embed, nothing pending": lambda i: [COMMAND, *embed, "--output-table", f"delta.`{folder}/out{i}`"],
        "summary": lambda i: [COMMAND, "summary", "--output-table", table],
        "export": lambda i: [COMMAND, "export", "--embeddings", table, "--out", f"{folder}/out{i}.parquet"],
        "doctor": lambda i: [COMMAND, "doctor", "--tables", table],
        "monitor": lambda i: [COMMAND, "monitor", "--output-table", table],
        "--help": lambda i: [COMMAND, "embed", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    cpu: dict[str, list[float]] = {name: [] for name in processes}
    parts: list[dict[str, float]] = []
    for i in range(tries + 1):  # the first round fills the file cache and is not counted
        for name, words in processes.items():
            taken, used, output = run(words(i), folder)
            if i:
                seconds[name].append(taken)
                cpu[name].append(used)
            if i and name == "bare Delta session":
                parts.append(json.loads(output.splitlines()[-1]))
            print(f"{i}/{tries} {name}: {taken:.1f} s, CPU {used:.1f} s", file=sys.stderr, flush=True)
    nothing = median([run(["pass"], folder)[0] for _ in range(tries)])
    imports = {name: median([run([f"import {name}"], folder)[0] - nothing for _ in range(tries)]) for name in LIBRARIES}
    return {
        "imports": imports,
        "session": {name: median([part[name] for part in parts]) for name in parts[0]},
        "processes": {name: median(each) for name, each in seconds.items()},
        "cpu": {name: median(each) for name, each in cpu.items()},
    }


def prepare(folder: Path) -> tuple[str, str]:
    """Write nine small rows and register the small golden checkpoint; return the table and the model."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    columns = ("adata_id", "x_data", "x_indices", "x_indptr", "n_obs", "n_vars", "adata_obs", "adata_var")
    lines = [{name: row[name] for name in columns} for row in small_rows(9, GOLDEN)]
    write_deltalake(f"{folder}/rows", pa.Table.from_pylist(lines))
    run([COMMAND, "register", "--checkpoint", str(GOLDEN / "checkpoint_flash"), "--name", "small"], folder)
    return f"delta.`{folder}/rows`", "models:/small/1"


def run(words: list[str], folder: Path) -> tuple[float, float, str]:
    """Run Python code with arguments; return its seconds, the CPU seconds of all its processes, and its output."""
    start, before = time.perf_counter(), cpu_seconds()
    done = subprocess.run([sys.executable, "-c", *words], capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:
        raise RuntimeError(f"{words} failed: {done.stderr[-2000:]}")
    taken = time.perf_counter() - start
    return taken, cpu_seconds() - before, done.stdout


def cpu_seconds() -> float:
    """Return the CPU time of all children so far, after those that still run have ended."""
    with suppress(ChildProcessError):
        while True:
            os.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def median(values: list[float]) -> float:
    return round(statistics.median(values), 2)


def show(found: dict[str, dict[str, float]]) -> None:
    bare = "bare Delta session"
    print(f"{'import of':<26} seconds")
    for name, seconds in found["imports"].items():
        print(f"  {name:<24} {seconds:6.2f}")
    print(f"{'bare Delta session':<26}")
    for name, seconds in found["session"].items():
        print(f"  {name:<24} {seconds:6.2f}")
    print(f"{'whole process':<26} {'seconds':>8} {'of bare':>8} {'CPU s':>8} {'of bare':>8}")
    for name, seconds in found["processes"].items():
        of_bare, cpu = seconds / found["processes"][bare], found["cpu"][name]
        print(f"  {name:<24} {seconds:8.1f} {of_bare:8.2f} {cpu:8.1f} {cpu / found['cpu'][bare]:8.2f}")


if __name__ == "__main__":
    main()

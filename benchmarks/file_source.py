"""The data source `anndata` over growing files: does a worker's memory stay flat, and does planning read no matrix?

Regime: sparse .h5ad files of 2,000 values a cell, uncompressed, `spark.read.format("anndata")` on two local cores,
every row read and thrown away (`noop`). Ceiling: the same bytes read from the file by one thread with h5py.

    python benchmarks/file_source.py --megabytes 50 500
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
from worker_memory import WorkerMemory

from scgpt_batch.spark.datasource import register
from scgpt_batch.spark.session import get_spark

GENES, VALUES = 20_000, 2_000  # genes of the file, values of a cell
PLAN = """
import json, resource, sys, time
from scgpt_batch.io.files import ReadOptions, plan
before, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
tasks = plan([sys.argv[1]], ReadOptions())
seconds, peak = time.monotonic() - clock, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([len(tasks), seconds, (peak - before) / 1e3]))
"""


def write_file(path: Path, cells: int) -> None:
    """Write counts block by block, so that this process stays small too."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        x = file.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [cells, GENES]})
        data = x.create_dataset("data", (cells * VALUES,), "f4", chunks=(100_000,))
        indices = x.create_dataset("indices", (cells * VALUES,), "i4", chunks=(100_000,))
        x["indptr"] = np.arange(cells + 1, dtype=np.int64) * VALUES
        genes = np.sort(rng.permuted(np.tile(np.arange(GENES, dtype=np.int32), (50, 1)), axis=1)[:, :VALUES], axis=1)
        for first in range(0, cells, 50):
            part = slice(first * VALUES, min(first + 50, cells) * VALUES)
            indices[part] = genes.ravel()[: part.stop - part.start]
            data[part] = rng.poisson(3, part.stop - part.start) + 1
        for table, prefix, n in (("obs", "CELL", cells), ("var", "GENE", GENES)):
            group = file.create_group(table)
            group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
            group.attrs["column-order"] = np.array([], dtype="S1")
            group["_index"] = np.array([f"{prefix}{i}" for i in range(n)], dtype=h5py.string_dtype())
            group["_index"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def ceiling(path: Path) -> float:
    """Seconds to read the matrix's bytes."""
    clock = time.monotonic()
    with h5py.File(path, "r") as file:
        for name in ("data", "indices"):
            values = file["X"][name]
            for first in range(0, values.shape[0], 10_000_000):
                values[first : first + 10_000_000]
    return time.monotonic() - clock


def measure(spark, path: Path) -> dict[str, float]:
    planned = subprocess.run([sys.executable, "-c", PLAN, str(path)], capture_output=True, text=True, check=True)
    tasks, plan_seconds, plan_mb = json.loads(planned.stdout)
    clock = time.monotonic()
    with WorkerMemory(os.getpid()) as memory:
        spark.read.format("anndata").load(str(path)).write.format("noop").mode("overwrite").save()
    seconds, plain = time.monotonic() - clock, ceiling(path)
    return {
        "file_mb": round(path.stat().st_size / 1e6), "tasks": tasks, "plan_seconds": round(plan_seconds, 2),
        "plan_mb": round(plan_mb), "worker_peak_mb": round(memory.peak_mb), "seconds": round(seconds, 1),
        "mb_per_second": round(path.stat().st_size / 1e6 / seconds), "ceiling_seconds": round(plain, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", nargs="+", type=int, default=[50, 500], help="sizes of the files")
    sizes = parser.parse_args().megabytes
    spark = get_spark({"spark.master": "local[2]", "spark.driver.memory": "1g"})
    register(spark)
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "warm-up.h5ad"
        write_file(small, 100)
        measure(spark, small)
        found = []
        for megabytes in sizes:
            path = Path(folder) / f"{megabytes}.h5ad"
            write_file(path, megabytes * 1_000_000 // (VALUES * 8))
            found.append(measure(spark, path))
            print(" · ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
            path.unlink()
    spark.stop()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"benchmark": "file_source", "driver_python_peak_mb": round(peak), "files": found}))


if __name__ == "__main__":
    main()

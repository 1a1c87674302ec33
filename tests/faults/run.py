"""Break the nightly run for real, many times, and count what is lost or doubled.

    make faults                                  all scenarios; about an hour and a half on two quiet cores
    .venv/bin/python tests/faults/run.py --only driver-killed --tries 3

Each scenario runs `scgpt-batch embed` as a user does, in processes of its own, over small real rows, breaks
something, runs it again, and looks at the tables. The last line is one JSON document; exit code 1 when a promise
was broken.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import psutil
import scipy.sparse as sp
from pyspark.sql import SparkSession

from scgpt_batch.anndata_rows import to_row
from scgpt_batch.spark import tables
from scgpt_batch.spark.session import get_spark

HERE = Path(__file__).parent
CHECKPOINT = HERE.parent / "data" / "golden" / "checkpoint_flash"
COMMAND = Path(sys.executable).parent / "scgpt-batch"
KEY = ["adata_id", "cell_id", "mode", "model_name", "model_version", "params_hash"]
CELLS = 3  # of a row


@dataclass
class Result:
    """What a scenario showed, over all its tries."""

    scenario: str
    tries: int = 0
    rows_in: int = 0
    rows_out: int = 0
    duplicates: int = 0
    lost: int = 0
    failed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        return not (self.duplicates or self.lost or self.notes)


class Bench:
    """A folder with a registered model, and the Spark session that looks at the tables."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # the caller's own experiment and store are not ours
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        self.environment = inherited | {
            "SPARK_LOCAL_IP": "127.0.0.1",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        }
        self.spark: SparkSession = get_spark({"spark.sql.warehouse.dir": str(folder / "warehouse")})
        self.call("register", "--checkpoint", CHECKPOINT, "--name", "faults").check_returncode()

    def call(self, *argv: object, **kwargs: object) -> subprocess.CompletedProcess:
        with self.process(*argv, **kwargs) as process:
            out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @contextmanager
    def process(self, *argv: object, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen]:
        """A command in a process group of its own, so that nothing of it outlives the scenario."""
        process = subprocess.Popen(
            [COMMAND, *map(str, argv)], cwd=self.folder, env=self.environment | (env or {}), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            kill_group(process)

    def rows(self, name: str, ids: list[str]) -> Path:
        """Write small rows of these keys."""
        path = self.folder / name
        tables.create(self.spark, f"delta.`{path}`", tables.ADATA_ROWS)
        self.append(path, ids)
        return path

    def append(self, path: Path, ids: list[str]) -> None:
        schema = self.spark.table(f"delta.`{path}`").schema
        made = [[row.get(f.name) for f in schema] for row in map(small_row, ids)]
        tables.append(self.spark.createDataFrame(made, schema).coalesce(2), f"delta.`{path}`")

    def embed(self, rows: Path, out: Path, *more: object) -> list[object]:
        """The command's words: cell mode, small waves."""
        return [
            "embed", "--model-uri", "models:/faults/1", "--input-table", f"delta.`{rows}`",
            "--output-table", f"delta.`{out}`", "--mode", "cell", "--need-preprocess", "false", "--data-is-raw",
            "--wave-cells", "60", "--max-failed-fraction", "0.5", *more,
        ]  # fmt: skip

    def look(self, result: Result, out: Path, ids: list[str]) -> None:
        """Compare the tables with the rows that were there."""
        table, ledger = (self.spark.read.format("delta").load(str(p)) for p in (out, beside(out, "_ledger")))
        result.tries += 1
        result.rows_in += len(ids)
        result.rows_out += table.select("adata_id").distinct().count()
        result.duplicates += table.groupBy(*KEY).count().where("count > 1").count()
        result.duplicates += ledger.groupBy("adata_id", "content_hash").count().where("count > 1").count()
        cells = {r["adata_id"]: r["count"] for r in table.groupBy("adata_id").count().collect()}
        failed = {r["adata_id"] for r in ledger.where("status = 'failed'").collect()}
        result.failed += len(failed)
        result.lost += sum(cells.get(i) != CELLS for i in ids if i not in failed)
        result.lost += len(set(cells) - set(ids))
        told = ledger.select("adata_id").distinct().count()
        if told != len(ids):
            result.notes.append(f"{told} of {len(ids)} rows in the ledger")


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def small_row(adata_id: str) -> dict:
    """Three cells of forty genes of the model's vocabulary; the content depends on the key."""
    genes = [name for name in json.loads((CHECKPOINT / "vocab.json").read_text()) if not name.startswith("<")][:40]
    rng = np.random.default_rng(abs(hash(adata_id)) % 2**32)
    counts = sp.csr_matrix((rng.poisson(1.0, (CELLS, 40)) + np.eye(CELLS, 40)).astype(np.float32))
    row = to_row(ad.AnnData(counts, obs=pd.DataFrame(index=list("abc")), var=pd.DataFrame(index=genes)))
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()} | {"adata_id": adata_id}


def kill_group(process: subprocess.Popen) -> None:
    """Kill -9 the command, its JVM and its workers (Spark's daemon leads a group of its own)."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """Spark's Python workers of a command: what the daemon has forked."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "pyspark.daemon" in child.cmdline() and child.parent() and "pyspark.daemon" in child.parent().cmdline():
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


# --- scenarios ------------------------------------------------------------------------------------


def driver_killed(bench: Bench, tries: int) -> Result:
    """kill -9 of driver, JVM and workers at a random moment, then run again."""
    result = Result("driver-killed")
    ids = [f"row-{i:03}" for i in range(120)]
    rows = bench.rows("driver_rows", ids)
    started = time.monotonic()
    done = bench.call(*bench.embed(rows, bench.folder / "driver_whole"))
    done.check_returncode()
    whole = time.monotonic() - started
    for i in range(tries):
        out = bench.folder / f"driver_{i}"
        with bench.process(*bench.embed(rows, out)) as process:
            time.sleep(random.uniform(0.3, 1.0) * whole)  # the first third is the start of Spark
            kill_group(process)
            process.communicate()
        before = unfinished_rows(bench, out)
        told = rerun(bench, result, bench.embed(rows, out))
        if told and before > 20:
            result.notes.append(f"try {i}: {before} rows were embedded again, a wave has 20")
        bench.look(result, out, ids)
    return result


def unfinished_rows(bench: Bench, out: Path) -> int:
    """Rows with embeddings and no line in the ledger: what a rerun computes a second time."""
    if not (out / "_delta_log").is_dir() or not (beside(out, "_ledger") / "_delta_log").is_dir():
        return 0
    table, ledger = (bench.spark.read.format("delta").load(str(p)) for p in (out, beside(out, "_ledger")))
    return table.select("adata_id").distinct().join(ledger, "adata_id", "left_anti").count()


def rerun(bench: Bench, result: Result, words: list[object], code: int = 0) -> dict:
    done = bench.call(*words)
    if done.returncode != code:
        result.notes.append(f"rerun ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
        return {}
    return json.loads(done.stdout.strip().splitlines()[-1])


def worker_killed(bench: Bench, tries: int) -> Result:
    """kill -9 of a Python worker in the middle of a wave: the run goes on."""
    result = Result("worker-killed")
    ids = [f"row-{i:03}" for i in range(120)]
    rows = bench.rows("worker_rows", ids)
    for i in range(tries):
        out = bench.folder / f"worker_{i}"
        with bench.process(*bench.embed(rows, out)) as process:
            killed = False
            while process.poll() is None and not killed:
                time.sleep(0.2)
                for worker in workers(process)[:1]:
                    time.sleep(random.uniform(0, 4))
                    if worker.is_running():
                        worker.kill()
                        killed = True
            _told, err = process.communicate()
        if process.returncode or not killed:
            result.notes.append(f"try {i}: killed {killed}, exit {process.returncode} {err.strip().splitlines()[-1:]}")
        bench.look(result, out, ids)
    return result


def two_drivers(bench: Bench, tries: int) -> Result:
    """Two runs at once over the same tables."""
    result = Result("two-drivers")
    ids = [f"row-{i:03}" for i in range(80)]
    rows = bench.rows("two_rows", ids)
    for i in range(tries):
        out = bench.folder / f"two_{i}"
        words = bench.embed(rows, out)
        with bench.process(*words) as one, bench.process(*words) as two:
            ends = [p.communicate()[1] for p in (one, two)]
        if one.returncode or two.returncode:
            last = [err.strip().splitlines()[-1:] for err in ends]
            result.notes.append(f"try {i}: exits {one.returncode}, {two.returncode} {last}")
        bench.look(result, out, ids)
    return result


def poison(bench: Bench, tries: int, rows_in: int = 1000) -> Result:
    """Rows that raise, segfault, hang and exhaust memory, among many."""
    result = Result("poison-rows")
    deadly = [f"{how}:{i}" for how in ("raise", "segfault", "hang", "memory") for i in range(tries)]
    ids = [f"row-{i:04}" for i in range(rows_in - len(deadly))] + deadly
    rows, out = bench.rows("poison_rows", ids), bench.folder / "poison_out"
    words = bench.embed(rows, out, "--wave-cells", "600", "--row-timeout", "20")
    words += ["--spark-conf", "spark.executor.pyspark.memory=6g"]
    done = bench.call(*words, env={"PYTHONPATH": str(HERE / "poison")})
    if done.returncode:
        result.notes.append(f"exit {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    bench.look(result, out, ids)
    ledger = bench.spark.read.format("delta").load(str(beside(out, "_ledger"))).where("status = 'failed'").collect()
    found = {line["adata_id"]: line["error_class"] for line in ledger}
    wanted = {i: "Timeout" if i.startswith("hang") else "WorkerCrash" for i in deadly}
    if found != wanted:
        result.notes.append(f"failed rows are {found}")
    return result


def no_space(bench: Bench, tries: int) -> Result:
    """The output's file system is full while a wave is committed; after that it has room."""
    result = Result("disk-full")
    ids = [f"row-{i:03}" for i in range(80)]
    rows = bench.rows("full_rows", ids)
    for i in range(tries):
        place = bench.folder / f"small_{i}"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={500 + 40 * i}k", "tmpfs", place], check=True)
        try:
            out = place / "out"
            done = bench.call(*bench.embed(rows, out))
            if done.returncode != 1 or "Traceback" in done.stderr:
                result.notes.append(f"try {i}: exit {done.returncode}")
            subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
            rerun(bench, result, bench.embed(rows, out))
            bench.look(result, out, ids)
        finally:
            subprocess.run(["umount", "-l", place], check=True)
    return result


def input_changes(bench: Bench, tries: int) -> Result:
    """The input table is appended to, rewritten and vacuumed during the run: it reads the snapshot it began with."""
    result = Result("input-changes")
    for i in range(tries):
        ids = [f"row-{j:03}" for j in range(80)]
        rows, out = bench.rows(f"changing_{i}", ids), bench.folder / f"changed_{i}"
        with bench.process(*bench.embed(rows, out)) as process:
            while process.poll() is None and not beside(out, "_runs").is_dir():
                time.sleep(0.1)
            change(bench, rows, i % 3)
            _, err = process.communicate()
        if process.returncode:
            result.notes.append(f"try {i}: exit {process.returncode} {err.strip().splitlines()[-1:]}")
        bench.look(result, out, ids)
    return result


def change(bench: Bench, rows: Path, how: int) -> None:
    if how == 0:
        bench.append(rows, [f"later-{j}" for j in range(10)])
    elif how == 1:
        table = bench.spark.read.format("delta").load(str(rows)).repartition(3)
        table.write.format("delta").mode("overwrite").save(str(rows))
    else:
        bench.spark.sql(f"OPTIMIZE delta.`{rows}`")
        bench.spark.sql(f"VACUUM delta.`{rows}`")


SCENARIOS: dict[str, tuple[Callable[[Bench, int], Result], int]] = {
    "driver-killed": (driver_killed, 30),
    "worker-killed": (worker_killed, 20),
    "two-drivers": (two_drivers, 10),
    "poison-rows": (poison, 1),
    "disk-full": (no_space, 5),
    "input-changes": (input_changes, 10),
}


def with_bench(work: Callable[[Bench], Any]) -> Any:
    """Do something in a folder of its own, which goes afterwards."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        return work(Bench(Path(folder)))


def _show(name: str, bench: Bench, tries: int | None) -> Result:
    scenario, usual = SCENARIOS[name]
    r = scenario(bench, tries or usual)
    counted = f"{r.tries:>6}{r.rows_in:>9}{r.rows_out:>9}{r.failed:>8}{r.duplicates:>11}{r.lost:>6}"
    print(f"{name:<15}{counted}", *r.notes, sep="\n  ", flush=True)
    return r


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the nightly run, and count what is lost or doubled.")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="scenarios to run")
    parser.add_argument("--tries", type=int, help="tries of each, instead of its own number")
    args = parser.parse_args()
    print(f"{'scenario':<15}{'tries':>6}{'rows in':>9}{'rows out':>9}{'failed':>8}{'duplicates':>11}{'lost':>6}")
    results = with_bench(lambda bench: [_show(name, bench, args.tries) for name in args.only])
    print(json.dumps([vars(r) for r in results]))
    return 0 if all(r.kept for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())

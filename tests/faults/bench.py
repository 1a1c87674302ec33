"""Shared by all scenarios: small rows, drivers that run the job, and the checks of the tables afterwards.

Tables are written and read with delta-rs, so that another reader than the job's own judges what it leaves.
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import scipy.sparse as sp
from deltalake import DeltaTable, write_deltalake

from scgpt_batch.inference.engine import Embedder, load_embedder
from scgpt_batch.io.rows import to_row
from scgpt_batch.parameters import Parameters
from tests.cluster import QUICK_JVM

REPO = Path(__file__).parents[2]
CHECKPOINT = REPO / "tests" / "data" / "golden" / "checkpoint_flash"
COMMAND = Path(sys.executable).parent / "scgpt-batch"
PARAMETERS = {"mode": "cell", "need_preprocess": False, "data_is_raw": True}
KEY = ["adata_id", "cell_id", "mode", "model_name", "model_version", "params_hash"]
CELLS = 3  # per row
WAVE = 4  # rows per wave
TOLERANCE = 1e-5  # for float32 vectors, with any partitions, waves and order

ADATA_ROWS = pa.schema(
    [
        pa.field("adata_id", pa.string(), nullable=False),
        ("adata_sparsematrix", pa.list_(pa.list_(pa.float64()))),
        ("x_data", pa.list_(pa.float32())), ("x_indices", pa.list_(pa.int32())), ("x_indptr", pa.list_(pa.int64())),
        ("n_obs", pa.int32()), ("n_vars", pa.int32()), ("adata_obs", pa.string()), ("adata_var", pa.string()),
        ("content_hash", pa.string()), ("x_dtype", pa.string()),
    ]
)  # fmt: skip


@dataclass
class Result:
    """The result of a scenario, over all its tries."""

    scenario: str
    tries: int = 0
    rows_in: int = 0
    rows_out: int = 0
    failed: int = 0
    duplicates: int = 0
    lost: int = 0
    broken: list[str] = field(default_factory=list)  # broken guarantees
    seen: Counter[str] = field(default_factory=Counter)  # events, counted over the tries

    @property
    def kept(self) -> bool:
        return not (self.duplicates or self.lost or self.broken)


@dataclass
class Ended:
    """An ended command: exit code, JSON line and standard error."""

    code: int
    summary: dict[str, Any]
    said: str

    def unless(self, code: int, *, raises: bool = False) -> Iterator[str]:
        """Yield a message if the exit code differs, or if the command printed a stack trace.

        Where a row `raises` on purpose, Spark's own log shows one.
        """
        if self.code != code:
            yield f"exit {self.code} instead of {code}: {self.last}"
        if not raises and "Traceback (most recent call last)" in self.said:
            yield "a stack trace on standard error"

    @property
    def last(self) -> str:
        return self.said.strip().rpartition("\n")[2][:500]


class Driver:
    """A process that runs commands in turn, in one Spark session (driver.py), until it is killed."""

    def __init__(self, folder: Path, environment: dict[str, str], *conf: str) -> None:
        folder.mkdir()
        self._conf, self._log, self._read = ["--spark-conf", *conf] if conf else [], folder / "stderr", 0
        self._reader = ThreadPoolExecutor(1)
        self._ending: Future[Ended] | None = None
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.driver"], cwd=REPO, env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip

    def start(self, words: Iterable[object]) -> None:
        """Start a command; Spark settings apply to the first one only."""
        self._read = self._log.stat().st_size
        line = json.dumps([*map(str, words), *self._conf])
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        self._ending = self._reader.submit(self._wait)

    def running(self) -> bool:
        return not self._ending.done()

    def end(self) -> Ended:
        """Wait for the started command."""
        return self._ending.result()

    def run(self, words: Iterable[object]) -> Ended:
        self.start(words)
        return self.end()

    def said(self) -> str:
        """The command's standard error so far."""
        return self._log.read_bytes()[self._read :].decode()

    def _wait(self) -> Ended:
        lines: list[str] = []
        for line in self.process.stdout:
            if line.startswith("exit "):
                return Ended(int(line.split()[1]), json.loads(lines[-1]) if lines else {}, self.said())
            lines.append(line)
        raise RuntimeError(f"the driver died: {self.said()[-2000:]}")


class Bench:
    """A folder with a registered model; the folder and all processes are removed at the end of the block."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        # do not use the caller's experiment and store
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        self.environment = inherited | {
            **QUICK_JVM,
            "PYTHONPATH": str(REPO),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/mlflow.db",
        }
        register = [COMMAND, "register", "--checkpoint", CHECKPOINT, "--name", "faults"]
        subprocess.run(register, cwd=self.folder, env=self.environment, check=True, capture_output=True)

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def driver(self, *conf: str, path: Path = REPO) -> Driver:
        """Start a driver with its own Spark settings and a folder to import from; it is killed with the bench."""
        environment = self.environment | {"PYTHONPATH": f"{path}:{REPO}"}
        driver = Driver(self.folder / f"driver-{time.monotonic_ns()}", environment, *conf)
        self._stack.callback(kill, driver.process)
        return driver

    @cached_property
    def warm(self) -> Driver:
        """The driver shared by scenarios that do not kill it."""
        return self.driver()

    def command(self, words: Sequence[object], log: Path) -> subprocess.Popen:
        """Run the console script, as a user does."""
        with log.open("w") as said:
            process = subprocess.Popen(
                [COMMAND, *map(str, words)], cwd=self.folder, env=self.environment,
                stdout=subprocess.DEVNULL, stderr=said, start_new_session=True,
            )  # fmt: skip
        self._stack.callback(kill, process)
        return process

    def rows(self, name: str, rows: Iterable[dict[str, Any]]) -> Path:
        """Write rows as a table in two files."""
        path, made = self.folder / name, list(rows)
        for part in (made[::2], made[1::2]):
            write_deltalake(path, arrow(part), mode="append")
        return path

    def disk(self, place: Path, *, size: int | str = "64m") -> None:
        """Mount a file system of limited size on a folder until the bench ends; needs root."""
        place.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
        self._stack.callback(subprocess.run, ["umount", "-l", place], check=True)

    def embed(self, rows: Path, out: Path, **more: object) -> list[object]:
        """Return the words of an embed command: cell mode, small waves."""
        given = PARAMETERS | {
            "model_uri": "models:/faults/1", "input_table": f"delta.`{rows}`", "output_table": f"delta.`{out}`",
            "wave_cells": CELLS * WAVE, "max_failed_fraction": 0.5,
        } | more  # fmt: skip
        words = ((f"--{name.replace('_', '-')}", str(value).lower() if value is True or value is False else value)
                 for name, value in given.items())  # fmt: skip
        return ["embed", *itertools.chain.from_iterable(words)]

    def tries(
        self, name: str, n: int, rows: list[dict[str, Any]], disturbed: Callable[[Path, Counter[str]], Iterator[str]]
    ) -> Result:
        """Run `disturbed` n times and check the tables each time; it yields the guarantees that were broken."""
        result = Result(name)
        for i in range(n):
            out = self.folder / f"{name}-{i}" / "out"
            out.parent.mkdir()
            result.broken += [f"try {i}: {promise}" for promise in disturbed(out, result.seen)]
            look(result, out, rows)
        return result


def kill(process: subprocess.Popen) -> None:
    """kill -9 a process and its descendants (Spark's Python daemon has its own process group)."""
    if process.poll() is None:
        for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            if_alive(member.kill)
    process.wait()


def if_alive(act: Callable[[], Any]) -> Any:
    """Call a function of a process that may have ended; None if it has."""
    try:
        return act()
    except psutil.NoSuchProcess:
        return None


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def read_columns(path: Path, *columns: str) -> pd.DataFrame:
    """Read columns of a table; no rows if it does not exist yet."""
    if not (path / "_delta_log").is_dir() or not DeltaTable.is_deltatable(str(path)):
        return pd.DataFrame(columns=list(columns))
    return DeltaTable(path).to_pyarrow_table(columns=list(columns)).to_pandas()


def arrow(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, ADATA_ROWS)


def small_row(adata_id: str, *, salt: str = "") -> dict[str, Any]:
    """Three cells of forty genes of the model's vocabulary; the content depends on key and salt."""
    digest = hashlib.sha256(f"{adata_id} {salt}".encode())
    rng = np.random.default_rng(list(digest.digest()))
    counts = sp.csr_matrix((rng.poisson(1.0, (CELLS, 40)) + np.eye(CELLS, 40)).astype(np.float32))
    row = to_row(ad.AnnData(counts, obs=pd.DataFrame(index=list("abc")), var=pd.DataFrame(index=embedder_genes()[:40])))
    return row | {"adata_id": adata_id, "content_hash": digest.hexdigest()[:32]}


def small_rows(n: int) -> list[dict[str, Any]]:
    return [small_row(f"row-{i:04}") for i in range(n)]


@cache
def embedder() -> Embedder:
    return load_embedder(CHECKPOINT)


@cache
def embedder_genes() -> list[str]:
    return [name for name in embedder().vocabulary.tokens if not name.startswith("<")]


def look(result: Result, out: Path, rows: list[dict[str, Any]]) -> None:
    """Compare the tables with the input rows and with the model's own results."""
    table = read_columns(out, *KEY, "embedding")
    ledger = read_columns(beside(out, "_ledger"), "adata_id", "content_hash", "status")
    failed = set(ledger.loc[ledger["status"] == "failed", "adata_id"])
    sound = [row for row in rows if row["adata_id"] not in failed]
    cells = table["adata_id"].value_counts()
    result.tries += 1
    result.rows_in += len(rows)
    result.rows_out += len(cells)
    result.failed += len(failed)
    result.duplicates += int(table.duplicated(KEY).sum() + ledger.duplicated("adata_id").sum())
    result.lost += sum(bool(cells.get(row["adata_id"], 0) < CELLS) for row in sound)
    for wrong in (_strangers(table, ledger, sound, rows), _wrong_vectors(table, sound)):
        result.broken += [f"{out.parent.name}: {message}" for message in wrong]


def _strangers(table: pd.DataFrame, ledger: pd.DataFrame, sound: list[dict], rows: list[dict]) -> Iterator[str]:
    """Yield messages about lines whose rows or contents were not in the input when the run started."""
    if unknown := set(table["adata_id"]) - {row["adata_id"] for row in sound}:
        yield f"embeddings of {sorted(unknown)[:3]}, which have no line with status ok in the ledger"
    found = dict(zip(ledger["adata_id"], ledger["content_hash"], strict=True))
    wanted = {row["adata_id"]: row["content_hash"] for row in rows}
    if found != wanted:
        differ = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        yield f"the ledger and the rows differ in {len(differ)} keys or contents, first {differ[:3]}"


def _wrong_vectors(table: pd.DataFrame, sound: list[dict]) -> Iterator[str]:
    """Yield messages about vectors that differ from those of the model for the row alone."""
    found = {key: np.stack(cells.sort_values("cell_id")["embedding"]) for key, cells in table.groupby("adata_id")}
    parameters = Parameters.create(PARAMETERS)
    for row, answer in zip(sound, embedder().embed_rows(sound, parameters), strict=True):
        vectors = found.get(row["adata_id"])
        if vectors is not None and vectors.shape == answer.embeddings.shape:
            difference = np.abs(vectors - answer.embeddings).max()
            if not difference <= TOLERANCE:
                yield f"{row['adata_id']}: a vector differs by {difference:g} from the model's"

"""The code that runs in Spark's Python workers: embedding as a function over Arrow batches.

`DataFrame.mapInArrow` calls it with batches of `adata_rows`; it yields batches of `ANSWERS`. Vectors are passed as one
contiguous buffer in a list array, without Python lists of floats.
"""

import atexit
import faulthandler
import gc
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any
from zipimport import zipimporter

import numba
import numpy as np
import pyarrow as pa
import torch
from pyspark import TaskContext
from pyspark.accumulators import Accumulator

from scgpt_batch.inference.engine import Embedder, load_embedder, opened_embedder
from scgpt_batch.inference.results import RowReport, RowResult
from scgpt_batch.io.rows import arrow_rows
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.sample_selection import Decisions
from scgpt_batch.spark.isolation import Result, isolates, results_alone

Batches = Iterable[pa.RecordBatch]

# Arrow schemas of what workers return to the JVM; Spark's schemas are derived from them (`from_arrow_schema`).
VECTOR = pa.list_(pa.field("element", pa.float32(), nullable=False))  # else the JVM checks each number for null

REPORT = pa.struct(
    [
        ("status", pa.string()), ("cells", pa.int64()), ("embeddings", pa.int64()), ("genes_in", pa.int32()),
        ("genes_matched", pa.int32()), ("coverage", pa.float64()), ("warnings", pa.list_(pa.string())),
        ("error_class", pa.string()), ("error_message", pa.string()),
    ]
)  # fmt: skip

# One line per embedding, then one line with the row's report: an embedding never comes without its row's report.
ANSWERS = pa.schema(
    [
        ("adata_id", pa.string()), ("content_hash", pa.string()), ("group", pa.string()), ("gene", pa.string()),
        ("cell_id", pa.string()), ("n_cells", pa.int32()), ("embedding", VECTOR), ("report", REPORT),
    ]
)  # fmt: skip
VECTORS = pa.schema([("gene", pa.string()), ("embedding", VECTOR)])

ROW_KEY = ("adata_id", "content_hash")
LINES = 4096  # per batch: 8 MB of vectors at d 512


@dataclass(frozen=True)
class ModelRef:
    """Where a worker finds the registered version: the checkpoint's folder if it is readable, else MLflow."""

    checkpoint: str
    digest: str
    uri: str
    tracking_uri: str
    registry_uri: str

    def load(self, device: str | None = None) -> Embedder:
        """Return the model, loaded in this process now or by an earlier task."""
        _use_own_cores_only()
        _forget_archives()
        opened = opened_embedder(self.digest, device)
        if opened is not None:
            return opened
        folder = self.checkpoint if Path(self.checkpoint).is_dir() else self.downloaded()
        embedder = load_embedder(folder, digest=self.digest, device=device)
        gc.freeze()  # Spark's worker collects garbage after each task: 0.2 s for the objects of the libraries
        return embedder

    def downloaded(self) -> Path:
        """Return the checkpoint's folder on this machine, downloaded once for all processes of the executor.

        It is in Spark's folder for temporary files, which Spark removes when the executor ends.
        """
        # takes seconds to import, and is needed only if the driver's folder is not readable here
        import mlflow

        from scgpt_batch.registry.resolve import resolve

        if not self.uri.startswith("models:/"):
            return resolve(self.uri).checkpoint
        place = os.environ.get("SPARK_LOCAL_DIRS", "").split(",")[0] or _temporary_folder()
        folder = Path(place) / f"scgpt_batch-{self.digest}"
        if not folder.is_dir():
            mlflow.set_tracking_uri(self.tracking_uri)
            mlflow.set_registry_uri(self.registry_uri)
            with tempfile.TemporaryDirectory(dir=place) as fetched:
                checkpoint = resolve(self.uri, into=fetched).checkpoint
                try:
                    checkpoint.rename(folder)
                except OSError:
                    if not folder.is_dir():  # else another process has created it
                        raise
        return folder


@cache
def _temporary_folder() -> str:
    """Create a folder that is removed when the process exits."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class WorkerTask:
    """What a worker does with each row."""

    model: ModelRef
    parameters: Parameters
    row_timeout: float  # seconds without a result, after which the process is considered hung
    sums: bool = False  # return contextual sums, to be added over the rows of a sample
    isolated: bool = False  # each row in its own process, even if the task itself cannot tell

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `Embedder.embed_sample_rows`; static vectors are joined later, from `static_vectors`."""
        return {"with_vectors": self.parameters.mode != "static", "sums": self.sums}


def task_device() -> str | None:
    """Return the GPU that Spark assigned to this task; None if it assigned none: the embedder then chooses."""
    context = TaskContext.get()
    gpu = context.resources().get("gpu") if context else None
    return f"cuda:{gpu.addresses[0]}" if gpu and torch.cuda.is_available() else None


def _use_own_cores_only() -> None:
    """Limit numba and torch to the cores that Spark assigned to the task, so that workers do not compete for cores."""
    cores = int(os.environ.get("OMP_NUM_THREADS", "1"))
    numba.set_num_threads(min(cores, numba.get_num_threads()))
    torch.set_num_threads(cores)


def _forget_archives() -> None:
    """Remove jars from Python's search path, and what was remembered of all archives on it.

    Before each task Spark's worker reads again the tables of contents of the archives that Python has searched: of
    thirty jars with `spark.jars.packages`, 0.4 s; and up to Python 3.11 of pyspark.zip for each package in it, 0.1 s.
    """
    sys.path[:] = [path for path in sys.path if not path.endswith(".jar")]
    for path, finder in list(sys.path_importer_cache.items()):
        if path.endswith(".jar") or isinstance(finder, zipimporter):
            del sys.path_importer_cache[path]


def embed_rows(work: WorkerTask, counter: Accumulator | None = None) -> Callable[[Batches], Batches]:
    """Return a function for `mapInArrow` that embeds each row, and adds the cells of finished rows to `counter`.

    If a row takes longer than `row_timeout`, the process exits with a traceback in the worker's log. Spark then
    repeats the task, with each row in its own process.
    """

    def run(batches: Batches) -> Batches:
        keys: deque[dict[str, Any]] = deque()  # another thread reads rows ahead of their results
        rows, device = _rows(batches, keys), task_device()
        answers: Iterator[RowResult]
        if work.isolated or isolates():
            results = results_alone(rows, partial(_embedding, work, device), work.row_timeout)
            answers = (r if isinstance(r, RowResult) else RowResult(report=RowReport(), error=r) for r in results)
        else:
            embedder = work.model.load(device)
            answers = watched(
                embedder.embed_sample_rows(map(with_its_decisions, rows), work.parameters, **work.options),
                work.row_timeout,
            )
        for answer in answers:
            yield from answer_batches(keys.popleft(), answer)
            if counter is not None:
                counter.add(answer.report.cells)

    return run


def _embedding(work: WorkerTask, device: str | None) -> Callable[[dict[str, Any]], RowResult]:
    embedder = work.model.load(device)
    return lambda row: next(embedder.embed_sample_rows([with_its_decisions(row)], work.parameters, **work.options))


def with_its_decisions(row: dict[str, Any]) -> tuple[dict[str, Any], Decisions | None]:
    """Return a row with the decisions of its sample, from its column of bytes; null: the row is its own sample."""
    data = row.get("decisions")
    return row, None if data is None else _decisions(data)


@lru_cache(maxsize=4)  # rows of a sample are adjacent
def _decisions(data: bytes) -> Decisions:
    return Decisions.from_bytes(data)


def _rows(batches: Batches, keys: deque[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for row in arrow_rows(batch):
            keys.append({name: row[name] for name in ROW_KEY})
            yield row


def watched(results: Iterable[Result], seconds: float) -> Iterator[Result]:
    """Yield results, but exit the process if one takes too long; faulthandler does it from C, without the GIL."""
    try:
        faulthandler.dump_traceback_later(seconds, exit=True)
        for result in results:
            faulthandler.cancel_dump_traceback_later()
            yield result
            faulthandler.dump_traceback_later(seconds, exit=True)
    finally:
        faulthandler.cancel_dump_traceback_later()


def static_vectors(model: ModelRef) -> Callable[[Batches], Batches]:
    """Return a function for `mapInArrow` that returns the static vectors of names in the vocabulary."""

    def run(batches: Batches) -> Batches:
        embedder = model.load()
        for batch in batches:
            names = batch.column("gene")
            tokens = embedder.vocabulary.ids(names.to_numpy(zero_copy_only=False))
            yield pa.RecordBatch.from_arrays([names, list_array(embedder.gene_table[tokens])], schema=VECTORS)

    return run


def answer_batches(key: dict[str, Any], answer: RowResult) -> Batches:
    """Yield a row's result as Arrow batches of `ANSWERS`: its embeddings, then its report; `key` identifies the row."""
    vectors = answer.embeddings
    n_lines = len(answer.genes or answer.cell_ids or ())
    for first in range(0, n_lines, LINES):
        part = slice(first, first + LINES)
        yield _batch(
            key,
            group=answer.groups and answer.groups[part],
            gene=answer.genes and answer.genes[part],
            cell_id=answer.cell_ids and answer.cell_ids[part],
            n_cells=None if answer.n_cells is None else answer.n_cells[part],
            embedding=None if vectors is None else list_array(vectors[part]),
            lines=len(range(n_lines)[part]),
        )
    report = vars(answer.report) | {
        "status": "failed" if answer.error else "ok",
        "embeddings": n_lines,
        "warnings": list(answer.report.warnings),
        "error_class": type(answer.error).__name__ if answer.error else None,
        "error_message": str(answer.error) if answer.error else None,
    }
    yield _batch(key, report=[report], lines=1)


def list_array(vectors: np.ndarray) -> pa.ListArray:
    """Return the rows of a float32 matrix as a list array, without copying."""
    n, d = vectors.shape
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel())
    return pa.ListArray.from_arrays(np.arange(0, n * d + 1, d, dtype=np.int32), flat, type=VECTOR)


def _batch(key: dict[str, Any], *, lines: int, **columns: Any) -> pa.RecordBatch:
    columns |= {name: pa.repeat(pa.scalar(value, pa.string()), lines) for name, value in key.items()}
    arrays = []
    for field in ANSWERS:
        values = columns.get(field.name)
        if values is None:
            values = pa.nulls(lines, field.type)
        arrays.append(values if isinstance(values, pa.Array) else pa.array(values, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=ANSWERS)

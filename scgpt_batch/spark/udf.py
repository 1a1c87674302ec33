"""The embedding as a function over Arrow batches: what runs in Spark's Python workers.

`DataFrame.mapInArrow` calls it with batches of `adata_rows` and takes batches of `ANSWERS`. Vectors travel as one
contiguous buffer under a list array; no Python list of floats is made.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pyarrow as pa
import torch

from scgpt_batch.anndata_rows import arrow_rows
from scgpt_batch.embedder import Answer, Embedder, load_embedder
from scgpt_batch.parameters import Parameters

Batches = Iterable[pa.RecordBatch]

REPORT = pa.struct(
    [
        ("status", pa.string()), ("cells", pa.int64()), ("embeddings", pa.int64()), ("genes_in", pa.int32()),
        ("genes_matched", pa.int32()), ("coverage", pa.float64()), ("warnings", pa.list_(pa.string())),
        ("error_class", pa.string()), ("error_message", pa.string()),
    ]
)  # fmt: skip

# One line an embedding, then one line a row with its report: an embedding is never without the row's report.
ANSWERS = pa.schema(
    [
        ("adata_id", pa.string()), ("content_hash", pa.string()), ("group", pa.string()), ("gene", pa.string()),
        ("cell_id", pa.string()), ("n_cells", pa.int32()), ("embedding", pa.list_(pa.float32())), ("report", REPORT),
    ]
)  # fmt: skip
ANSWERS_DDL = """
    adata_id STRING, content_hash STRING, `group` STRING, gene STRING, cell_id STRING, n_cells INT,
    embedding ARRAY<FLOAT>, report STRUCT<status: STRING, cells: BIGINT, embeddings: BIGINT, genes_in: INT,
    genes_matched: INT, coverage: DOUBLE, warnings: ARRAY<STRING>, error_class: STRING, error_message: STRING>
"""
VECTORS = pa.schema([("gene", pa.string()), ("embedding", pa.list_(pa.float32()))])
VECTORS_DDL = "gene STRING, embedding ARRAY<FLOAT>"

LINES = 4096  # of a batch: 8 MB of vectors at d 512


@dataclass(frozen=True)
class ModelRef:
    """How a worker finds the registered version: its checkpoint's files where it can see them, else through MLflow."""

    checkpoint: str
    digest: str
    uri: str
    tracking_uri: str
    registry_uri: str

    def load(self) -> Embedder:
        """Load the model in this process, or take it from an earlier task of the process."""
        _use_own_cores_only()
        folder = self.checkpoint if Path(self.checkpoint).is_dir() else self._fetch()
        return load_embedder(folder, digest=self.digest)

    def _fetch(self) -> Path:
        # seconds to import, and needed only where the driver's folder cannot be seen
        import mlflow

        from scgpt_batch.registry import resolve

        mlflow.set_tracking_uri(self.tracking_uri)
        mlflow.set_registry_uri(self.registry_uri)
        return resolve(self.uri).checkpoint


def _use_own_cores_only() -> None:
    """Keep numba and torch to the cores that Spark gave the task: workers side by side would fight for them."""
    cores = int(os.environ.get("OMP_NUM_THREADS", "1"))
    numba.set_num_threads(min(cores, numba.get_num_threads()))
    torch.set_num_threads(cores)


def embed_rows(model: ModelRef, parameters: Parameters, min_coverage: float) -> Callable[[Batches], Batches]:
    """Return a function for `mapInArrow` that answers each row.

    In static mode it gives genes without vectors: `static_vectors` has them, to be joined once.
    """

    def run(batches: Batches) -> Batches:
        embedder = model.load()
        for batch in batches:
            for row in arrow_rows(batch):
                answer = embedder.embed(row, parameters, min_coverage=min_coverage)
                yield from answer_batches(row, answer, with_vectors=parameters.mode != "static")

    return run


def static_vectors(model: ModelRef) -> Callable[[Batches], Batches]:
    """Return a function for `mapInArrow` that gives the vocabulary's vectors, whatever comes in."""

    def run(batches: Batches) -> Batches:
        for _ in batches:
            embedder = model.load()
            table, tokens = embedder.gene_table, embedder.vocabulary.tokens
            for first in range(0, len(tokens), LINES):
                part = slice(first, first + LINES)
                columns = [pa.array(tokens[part], pa.string()), list_array(table[part])]
                yield pa.RecordBatch.from_arrays(columns, schema=VECTORS)

    return run


def answer_batches(row: dict[str, Any], answer: Answer, *, with_vectors: bool) -> Batches:
    """Spell an answer as Arrow batches of `ANSWERS`: its embeddings, then its report."""
    vectors = answer.embeddings
    n_lines = 0 if vectors is None else len(vectors)
    for first in range(0, n_lines, LINES):
        part = slice(first, first + LINES)
        yield _batch(
            row,
            group=answer.groups and answer.groups[part],
            gene=answer.genes and answer.genes[part],
            cell_id=answer.cell_ids and answer.cell_ids[part],
            n_cells=None if answer.n_cells is None else answer.n_cells[part],
            embedding=list_array(vectors[part]) if with_vectors and vectors is not None else None,
            lines=len(range(n_lines)[part]),
        )
    report = vars(answer.report) | {
        "status": "failed" if answer.error else "ok",
        "embeddings": n_lines,
        "warnings": list(answer.report.warnings),
        "error_class": type(answer.error).__name__ if answer.error else None,
        "error_message": str(answer.error) if answer.error else None,
    }
    yield _batch(row, report=[report], lines=1)


def list_array(vectors: np.ndarray) -> pa.ListArray:
    """Lay a list array over the rows of a float32 matrix, without copying it."""
    n, d = vectors.shape
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel())
    return pa.ListArray.from_arrays(np.arange(0, n * d + 1, d, dtype=np.int32), flat)


def _batch(row: dict[str, Any], *, lines: int, **columns: Any) -> pa.RecordBatch:
    columns |= {name: [row[name]] * lines for name in ("adata_id", "content_hash")}
    arrays = []
    for field in ANSWERS:
        values = columns.get(field.name)
        if values is None:
            values = pa.nulls(lines, field.type)
        arrays.append(values if isinstance(values, pa.Array) else pa.array(values, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=ANSWERS)

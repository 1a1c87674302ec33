"""The embedding as a function over Arrow batches: what runs in Spark's Python workers.

`DataFrame.mapInArrow` calls it with batches of `adata_rows` and takes batches of `ANSWERS`. Vectors travel as one
contiguous buffer under a list array; no Python list of floats is made.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa

from scgpt_batch import registry
from scgpt_batch.anndata_rows import arrow_rows
from scgpt_batch.embedder import Answer, Embedder
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
    """How a worker finds the model: its files where it can see them, else MLflow."""

    folder: str
    uri: str
    tracking_uri: str
    registry_uri: str

    @classmethod
    def of(cls, model: registry.ResolvedModel) -> "ModelRef":
        """Point to a resolved model."""
        return cls(str(model.folder), model.uri, mlflow.get_tracking_uri(), mlflow.get_registry_uri())

    def load(self) -> Embedder:
        """Load the model in this process, or take it from an earlier task of the process."""
        if self not in _LOADED:
            mlflow.set_tracking_uri(self.tracking_uri)
            mlflow.set_registry_uri(self.registry_uri)
            logging.getLogger("mlflow").setLevel(logging.ERROR)  # its advice on each load is not a job's news
            _LOADED[self] = registry.load(self.folder if Path(self.folder).is_dir() else self.uri)
        return _LOADED[self]


_LOADED: dict[ModelRef, Embedder] = {}


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

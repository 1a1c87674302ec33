"""`annotate`: labels of cells, voted by their nearest reference cells."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from scgpt_batch.analysis.annotate import UNKNOWN, Neighbors, nearest_cells, transfer_labels, without
from scgpt_batch.cli.analysis_tables import ANNOTATIONS, AnalysisTables
from scgpt_batch.cli.cell_sources import Cells, log_left_out, read_cells
from scgpt_batch.command_result import CommandResult, plural
from scgpt_batch.embedding_tables import MODEL, EmbeddingLines, Embeddings, described_model
from scgpt_batch.errors import ConfigError
from scgpt_batch.io.delta import table_path
from scgpt_batch.settings import AnnotateSettings

logger = logging.getLogger(__name__)

SHOWN_LABELS = 10


@dataclass(frozen=True, kw_only=True)
class AnnotateResult(CommandResult):
    """How many cells got a label."""

    cells: int
    unknown: int
    table: str
    reference_cells: int
    labels: dict[str, int]  # label -> cells, most frequent first
    mean_confidence: float

    def lines(self) -> list[str]:
        """Say how many cells got which label."""
        lines = [
            f"{plural(self.cells, 'cell')} annotated from {plural(self.reference_cells, 'reference cell')}, "
            f"{self.unknown:,} of them {UNKNOWN}; mean confidence {self.mean_confidence:.2f}"
        ]
        shown = list(self.labels.items())
        lines += [f"  {label:<24} {count:>10,}" for label, count in shown[:SHOWN_LABELS]]
        if len(shown) > SHOWN_LABELS:
            lines.append(f"  and {plural(len(shown) - SHOWN_LABELS, 'further label')}")
        return [*lines, f"annotations in {self.table}"]


def annotate(settings: AnnotateSettings) -> AnnotateResult:
    """Write a label for each cell of a table, by the votes of its nearest labelled reference cells.

    Raises
    ------
    ConfigError
        A table or column does not exist, the tables' models differ, or too few reference cells have labels.
    """
    tables = AnalysisTables(settings.spark_conf)
    choice = {"mode": "cell", "model_version": settings.model_version}
    query = tables.embeddings(settings.query, **choice)
    reference = _open(settings.reference, tables, choice)
    _require_one_model(query, reference)
    labels = _labels(reference, settings, read_cells(settings.labels, tables))
    labelled = np.array([label is not None for label in labels], bool)
    reference_keys = reference.frame()[["adata_id", "cell_id"]][labelled]
    finite = np.isfinite(query.vectors).all(axis=1)
    log_left_out(~finite, "NaN or infinity in the vector")
    query_keys, query_vectors = query.frame().loc[finite, ["adata_id", "cell_id"]], query.vectors[finite]
    itself = _itself(query_keys, reference_keys, tables, settings)
    k = settings.neighbours
    neighbors = nearest_cells(
        query_vectors, _selected(reference, labelled), k + (itself is not None), metric=settings.metric
    )
    if itself is not None:
        neighbors = without(neighbors, itself)
    votes = transfer_labels(
        neighbors,
        labels[labelled],
        min_confidence=settings.min_confidence,
        correct_frequency=settings.correct_frequency,
        clusters=_clusters(query_vectors) if settings.vote == "cluster" else None,
    )
    rows = _rows(query_keys, votes, neighbors, _names(reference_keys))
    constants = tables.made_of(settings.query, query.model, _params(settings)) | {
        "reference_table": tables.full_name(settings.reference),
        "reference_version": tables.version(settings.reference),
        "labels": settings.labels,
        "label_column": settings.label_column,
    }
    keys = (*MODEL, "source_table", "reference_table", "label_column")
    tables.replace(settings.out, ANNOTATIONS, rows, constants, keys)
    counts = votes["label"].value_counts()
    return AnnotateResult(
        cells=len(votes),
        unknown=int((votes["label"] == UNKNOWN).sum()),
        table=settings.out,
        reference_cells=int(labelled.sum()),
        labels={str(label): int(count) for label, count in counts.items()},
        mean_confidence=float(votes["confidence"].mean()),
    )


def _open(table: str, tables: AnalysisTables, choice: dict[str, str]) -> Embeddings | EmbeddingLines:
    """Open the reference; the vectors of a table at a path are read block by block."""
    return tables.embeddings(table, **choice) if table_path(table) is None else tables.lines(table, **choice)


def _require_one_model(query: Embeddings, reference: Embeddings | EmbeddingLines) -> None:
    if query.model == reference.model:
        return
    both = sorted({*query.other_models, described_model(query.model)} & {
        *reference.other_models, described_model(reference.model),
    })  # fmt: skip
    remedy = f"both tables have {both[0]}: choose it with --model-version" if both else (
        "vectors of different models, versions or parameters are not comparable: embed one of the tables again"
    )  # fmt: skip
    raise ConfigError(
        f"query and reference differ: {query.source} has {described_model(query.model)}, {reference.source} has "
        f"{described_model(reference.model)}; {remedy}"
    )


def _labels(reference: Embeddings | EmbeddingLines, settings: AnnotateSettings, cells: Cells) -> np.ndarray:
    """Return the label of each reference cell; None for cells without one."""
    found = cells.labels(settings.label_column, cells.places(reference.frame(), settings.reference))
    n_labelled = sum(label is not None for label in found)
    if n_labelled < settings.neighbours:
        raise ConfigError(
            f"{plural(n_labelled, 'cell')} of {settings.reference} have a value of {settings.label_column!r} in "
            f"{settings.labels}, fewer than the {settings.neighbours} neighbours that vote: give other labels, or a "
            "smaller --neighbours"
        )
    return found


def _selected(reference: Embeddings | EmbeddingLines, kept: np.ndarray) -> Iterator[np.ndarray]:
    first = 0
    for block in reference.blocks():
        yield block[kept[first : first + len(block)]]
        first += len(block)


def _itself(
    query: pd.DataFrame, reference: pd.DataFrame, tables: AnalysisTables, settings: AnnotateSettings
) -> np.ndarray | None:
    """Return where each query cell is in the reference, if both are one table: a cell does not vote on itself."""
    if tables.full_name(settings.query) != tables.full_name(settings.reference):
        return None
    return pd.MultiIndex.from_frame(reference).get_indexer(pd.MultiIndex.from_frame(query))


def _clusters(vectors: np.ndarray) -> np.ndarray:
    from scgpt_batch.analysis.clusters import leiden, neighbor_graph  # imports scanpy, which takes seconds

    return leiden(neighbor_graph(vectors), resolution=1.0)


def _names(cells: pd.DataFrame) -> np.ndarray:
    """Return names that are unique in the table: those of the cells, with their rows if names are repeated."""
    names = cells["cell_id"] if cells["cell_id"].is_unique else cells["adata_id"] + ":" + cells["cell_id"]
    return names.to_numpy(dtype=object)


def _rows(query: pd.DataFrame, votes: pd.DataFrame, neighbors: Neighbors, names: np.ndarray) -> pa.Table:
    n, k = neighbors.index.shape
    ends = pa.array(np.arange(0, n * k + 1, k), pa.int32())
    lists = {
        "neighbours": pa.ListArray.from_arrays(
            ends, pa.array(names, pa.string()).take(pa.array(neighbors.index.ravel()))
        ),
        "distances": pa.ListArray.from_arrays(ends, pa.array(neighbors.distance.ravel())),
    }
    return pa.table({name: pa.array(column) for name, column in {**query, **votes}.items()} | lists)


def _params(settings: AnnotateSettings) -> dict[str, Any]:
    names = {"neighbours", "metric", "min_confidence", "vote", "correct_frequency"}
    return settings.model_dump(include=names)

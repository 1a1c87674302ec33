"""Label transfer: the labels of the nearest reference cells, by exact search in blocks.

Memory is bounded: blocks of queries meet blocks of the reference, and only the k best are kept; cells × cells never
exist.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from scgpt_batch.analysis.largest import largest
from scgpt_batch.errors import ConfigError

QUERY_BLOCK, REFERENCE_BLOCK = 2_048, 16_384  # 134 MB of similarities at a time
UNKNOWN = "unknown"

Metric = Literal["cosine", "euclidean"]


@dataclass(frozen=True)
class Neighbors:
    """The nearest reference cells of each query.

    Attributes
    ----------
    index
        Positions in the reference, nearest first, int64, (queries, k).
    distance
        Their distances, ascending, float32, (queries, k): 1 - cosine, or euclidean.
    """

    index: np.ndarray
    distance: np.ndarray


def nearest_cells(
    query: np.ndarray, reference: np.ndarray | Iterable[np.ndarray], k: int = 10, *, metric: Metric = "cosine"
) -> Neighbors:
    """Find the k nearest reference cells of each query cell, exactly.

    Parameters
    ----------
    query
        float32, (queries, d).
    reference
        float32, (cells, d), or its blocks one after the other. Vectors with NaN or infinity are nobody's neighbours.
    k
        Neighbours of each query.
    metric
        "cosine" or "euclidean".

    Returns
    -------
    Neighbors
        Positions and distances, (queries, k), nearest first.

    Raises
    ------
    ConfigError
        The reference has fewer than k cells, or vectors of another length.

    Examples
    --------
    >>> reference = np.array([[1, 0], [0.9, 0.1], [0, 1]], dtype=np.float32)
    >>> nearest_cells(reference[:1], reference, k=2).index.tolist()
    [[0, 1]]
    """
    blocks = _blocks(reference) if isinstance(reference, np.ndarray) else iter(reference)
    query = _prepared(np.asarray(query, np.float32), metric)
    best = np.full((len(query), 0), -np.inf, np.float32)
    index = np.zeros((len(query), 0), np.int64)
    first = 0
    for raw in blocks:
        block = np.asarray(raw, np.float32)
        unusable = np.asarray(~np.isfinite(block).all(axis=1))
        if unusable.any():
            block = np.where(unusable[:, None], np.float32(0), block)
        block = _prepared(block, metric)
        if block.shape[1] != query.shape[1]:
            raise ConfigError(f"query vectors have {query.shape[1]} numbers, reference vectors {block.shape[1]}")
        best, index = _merged(query, block, unusable, first, best, index, k, metric)
        first += len(block)
    if first < k:
        raise ConfigError(f"the reference has {first} cells, fewer than the {k} neighbours asked for")
    distance = 1 - best if metric == "cosine" else np.sqrt(np.maximum(-best, 0))
    return Neighbors(index, np.maximum(distance, 0).astype(np.float32))


def without(neighbors: Neighbors, excluded: np.ndarray) -> Neighbors:
    """Return all but one neighbour of each query: without the excluded one, or else without the farthest.

    Parameters
    ----------
    excluded
        Position in the reference for each query, such as that of the query itself; -1: none.
    """
    n, k = neighbors.index.shape
    kept = neighbors.index != excluded[:, None]
    kept[kept.all(axis=1), -1] = False
    return Neighbors(neighbors.index[kept].reshape(n, k - 1), neighbors.distance[kept].reshape(n, k - 1))


def transfer_labels(
    neighbors: Neighbors,
    labels: np.ndarray,
    *,
    min_confidence: float = 0.0,
    correct_frequency: bool = False,
    clusters: np.ndarray | None = None,
) -> pd.DataFrame:
    """Vote on each query's label among its neighbours.

    Parameters
    ----------
    neighbors
        Of each query.
    labels
        Label of each reference cell.
    min_confidence
        Queries whose label has a smaller share of the votes are "unknown".
    correct_frequency
        Weigh a vote by 1 / ln(1 + the label's number of reference cells), so that rare labels are not outvoted.
    clusters
        Cluster of each query: the votes of a cluster's queries are added, and all of them get its label.

    Returns
    -------
    DataFrame
        One row per query: label and confidence (its share of the votes, 0 to 1), label_weighted and confidence_weighted
        (a vote counts 1 / distance). Labels with equal votes: the one with the nearest neighbour.

    Examples
    --------
    >>> reference = np.array([[1, 0], [0.9, 0.1], [0, 1]], dtype=np.float32)
    >>> neighbors = nearest_cells(reference[:1], reference, k=3)
    >>> transfer_labels(neighbors, np.array(["B", "B", "T"]))[["label", "confidence"]].round(2).to_dict("records")
    [{'label': 'B', 'confidence': 0.67}]
    """
    codes, names = pd.factorize(np.asarray(labels, dtype=object), sort=True)
    if (codes < 0).any():
        raise ConfigError(f"{int((codes < 0).sum())} reference cells have no label: leave them out")
    votes = codes[neighbors.index]  # (queries, k)
    weight = np.ones(len(names))
    if correct_frequency:
        weight = 1 / np.log1p(np.bincount(codes, minlength=len(names)))
    near = 1 / np.maximum(neighbors.distance, 1e-6)
    plain, weighted = (_shares(votes, w, len(names)) for w in (weight[votes], weight[votes] * near))
    if clusters is not None:
        plain, weighted = (_of_clusters(shares, clusters) for shares in (plain, weighted))
    table = {}
    for suffix, shares in (("", plain), ("_weighted", weighted)):
        label, confidence = _winner(shares, votes)
        found = names[label].astype(object)
        found[confidence < min_confidence] = UNKNOWN
        table[f"label{suffix}"], table[f"confidence{suffix}"] = found, confidence
    return pd.DataFrame(table)[["label", "confidence", "label_weighted", "confidence_weighted"]]


def _blocks(reference: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(reference), REFERENCE_BLOCK):
        yield reference[first : first + REFERENCE_BLOCK]


def _prepared(x: np.ndarray, metric: Metric) -> np.ndarray:
    if metric == "euclidean":
        return x
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)


def _merged(
    query: np.ndarray,
    block: np.ndarray,
    unusable: np.ndarray,
    first: int,
    best: np.ndarray,
    index: np.ndarray,
    k: int,
    metric: Metric,
) -> tuple[np.ndarray, np.ndarray]:
    """Merge a block of the reference, but its unusable cells, into the best so far; earlier cells win ties."""
    kept_best, kept_index = [], []
    norms = (block * block).sum(axis=1) if metric == "euclidean" else None
    for start in range(0, max(len(query), 1), QUERY_BLOCK):
        part = slice(start, start + QUERY_BLOCK)
        similarity = query[part] @ block.T
        if norms is not None:  # minus the squared distance
            similarity *= 2
            similarity -= norms
            similarity -= (query[part] * query[part]).sum(axis=1)[:, None]
        if unusable.any():
            similarity[:, unusable] = -np.inf
        values, places = _best_of_block(similarity, best[part], k)
        places += first
        together = np.concatenate([best[part], values], axis=1)
        places = np.concatenate([index[part], places], axis=1)
        order = np.lexsort((places, -together), axis=1)[:, :k]
        rows = np.arange(len(together))[:, None]
        kept_best.append(together[rows, order])
        kept_index.append(places[rows, order])
    return np.concatenate(kept_best), np.concatenate(kept_index)


def _best_of_block(similarity: np.ndarray, best: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return values and columns of a block that may be among the k best of each query, padded with -infinity.

    Once a query has k neighbours, few cells of a further block come nearer than the last of them. To find these takes
    one comparison per cell, much less than to sort.
    """
    n, width = similarity.shape
    if best.shape[1] < k:
        top = largest(similarity, min(k, width))
        return np.take_along_axis(similarity, top, axis=1), top
    rows, columns = np.divmod(np.flatnonzero(similarity > best[:, -1:]), width)  # faster than np.nonzero
    counts = np.bincount(rows, minlength=n)
    values = np.full((n, counts.max(initial=0)), -np.inf, np.float32)
    places = np.zeros(values.shape, np.int64)
    slot = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    values[rows, slot], places[rows, slot] = similarity[rows, columns], columns
    return values, places


def _shares(votes: np.ndarray, weights: np.ndarray, n_labels: int) -> np.ndarray:
    """Add up the votes for each label: (queries, labels), rows of sum 1."""
    place = np.arange(len(votes))[:, None] * n_labels + votes
    sums = np.bincount(place.ravel(), weights.ravel(), len(votes) * n_labels).reshape(len(votes), n_labels)
    return sums / sums.sum(axis=1, keepdims=True)


def _of_clusters(shares: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    codes, _ = pd.factorize(np.asarray(clusters))
    if len(codes) != len(shares):
        raise ConfigError(f"{len(codes)} clusters are given for {len(shares)} cells")
    means = np.zeros((codes.max() + 1, shares.shape[1]))
    np.add.at(means, codes, shares)
    return (means / np.bincount(codes)[:, None])[codes]


def _winner(shares: np.ndarray, votes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each query's label of most votes and its share; of equal ones that of the nearest neighbour."""
    most = shares.max(axis=1)
    is_best = shares >= most[:, None] - 1e-9
    nearest_first = np.take_along_axis(is_best, votes, axis=1)
    has_vote = nearest_first.any(axis=1)  # a cluster's label may have no vote among a cell's own neighbours
    of_neighbor = votes[np.arange(len(votes)), nearest_first.argmax(axis=1)]
    return np.where(has_vote, of_neighbor, is_best.argmax(axis=1)), most

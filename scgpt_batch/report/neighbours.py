"""The nearest genes of every gene, by cosine similarity.

Up to `EXACT` genes are compared with all others. More are sorted into cells around random genes, and each is compared
with the genes of the cells next to it; the share of true neighbours that this finds is measured and reported.
"""

from dataclasses import dataclass

import numpy as np

from scgpt_batch.analysis.largest import largest

EXACT = 12_000  # up to this many genes are compared with all others; takes about two seconds
CELLS_SEARCHED = 24
CHECKED = 200  # genes whose neighbours are also searched exactly
BLOCK = 1_024


@dataclass(frozen=True)
class NearestGenes:
    """The nearest genes of each gene.

    Attributes
    ----------
    index, cosine
        int32 and float32, (genes, k), nearest first; the gene itself is not among them.
    recall
        Share of the true neighbours found, measured on `CHECKED` genes; 1.0: all pairs were compared.
    """

    index: np.ndarray
    cosine: np.ndarray
    recall: float


def nearest_genes(vectors: np.ndarray, k: int = 10, *, seed: int = 0) -> NearestGenes:
    """Find each gene's nearest genes.

    Parameters
    ----------
    vectors
        float32, (genes, d).
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)
    everything = np.arange(len(unit))
    k = min(k, len(unit) - 1)
    if len(unit) <= EXACT:
        return NearestGenes(*_among(unit, everything, everything, k), recall=1.0)
    rng = np.random.default_rng(seed)
    index, cosine = _by_cells(unit, k, rng)
    checked = np.sort(rng.choice(len(unit), CHECKED, replace=False))
    true, _ = _among(unit, checked, everything, k)
    found = [len(np.intersect1d(a, b)) for a, b in zip(index[checked], true, strict=True)]
    return NearestGenes(index, cosine, float(np.sum(found)) / true.size)


def _by_cells(unit: np.ndarray, k: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Search each gene's neighbours in the cells whose centres are nearest to its own cell's centre."""
    centres = unit[np.sort(rng.choice(len(unit), round(len(unit) ** 0.5), replace=False))]
    cell = _cell_of(unit, centres)
    sums = np.zeros_like(centres)
    np.add.at(sums, cell, unit)
    centres = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
    cell = _cell_of(unit, centres)  # one step of k-means
    size = np.bincount(cell, minlength=len(centres))
    members = np.split(np.argsort(cell, kind="stable"), np.cumsum(size)[:-1])
    near = np.argsort(-(centres @ centres.T), axis=1, kind="stable")
    index = np.empty((len(unit), k), np.int32)
    cosine = np.empty((len(unit), k), np.float32)
    for number, genes in enumerate(members):
        if not len(genes):
            continue
        searched = near[number][: np.searchsorted(np.cumsum(size[near[number]]), k + 1) + CELLS_SEARCHED]
        candidates = np.sort(np.concatenate([members[other] for other in searched]))
        index[genes], cosine[genes] = _among(unit, genes, candidates, k)
    return index, cosine


def _cell_of(unit: np.ndarray, centres: np.ndarray) -> np.ndarray:
    blocks = range(0, len(unit), BLOCK * 8)
    return np.concatenate([(unit[start : start + BLOCK * 8] @ centres.T).argmax(axis=1) for start in blocks])


def _among(unit: np.ndarray, genes: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k nearest of `candidates` (ascending, with `genes` among them) for each of `genes`."""
    index = np.empty((len(genes), k), np.int32)
    cosine = np.empty((len(genes), k), np.float32)
    others = unit[candidates] if len(candidates) < len(unit) else unit
    own = np.searchsorted(candidates, genes)
    for start in range(0, len(genes), BLOCK):
        part = slice(start, start + BLOCK)
        similarity = unit[genes[part]] @ others.T
        similarity[np.arange(len(similarity)), own[part]] = -np.inf
        top = largest(similarity, k)
        values = np.take_along_axis(similarity, top, axis=1)
        order = np.lexsort((top, -values), axis=1)
        index[part] = candidates[np.take_along_axis(top, order, axis=1)]
        cosine[part] = np.take_along_axis(values, order, axis=1)
    return index, cosine

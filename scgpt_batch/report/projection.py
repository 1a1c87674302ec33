"""Maps of vectors in two dimensions: UMAP of a sample, and the other points beside their neighbours in it.

UMAP of 50,000 points takes a minute. A sample of 5,000 shows the same clusters in seconds; each other point is placed
among its nearest points of the sample.
"""

from dataclasses import dataclass

import anndata as ad
import numpy as np
import scanpy as sc

from scgpt_batch.analysis.clusters import keep_compiled_umap
from scgpt_batch.analysis.largest import largest

COMPONENTS = 50  # principal components from which neighbours are found; scanpy's number
LANDMARKS = 5_000
NEIGHBOURS = 15  # of UMAP
PLACED_BY = 5  # landmarks between which another point is placed
EPOCHS = 200  # of UMAP's layout; its default for more than 10,000 points
BLOCK = 4_096


@dataclass(frozen=True)
class Projection:
    """Positions in two dimensions.

    Attributes
    ----------
    xy
        float32, (points, 2).
    landmarks
        Points that UMAP laid out; the others were placed among them.
    components
        Principal components that were used.
    variance
        Share of the variance that they hold.
    """

    xy: np.ndarray
    landmarks: int
    components: int
    variance: float

    def described(self, noun: str) -> str:
        """Say how the map was made."""
        n = len(self.xy)
        text = (
            f"UMAP ({NEIGHBOURS} neighbours, {EPOCHS} epochs, seed 0) of {self.components} principal components, which "
            f"hold {self.variance:.0%} of the variance."
        )
        if self.landmarks < n:
            text += (
                f" UMAP laid out {self.landmarks:,} random {noun}s; each of the other {n - self.landmarks:,} stands "
                f"between its {PLACED_BY} nearest of them."
            )
        return text


def project(vectors: np.ndarray, *, seed: int = 0) -> Projection:
    """Lay out vectors in two dimensions. The same vectors and seed give the same positions.

    Parameters
    ----------
    vectors
        float32, (points, d), finite.
    """
    reduced, variance = principal_components(vectors)
    n = len(reduced)
    if n <= 3:
        return Projection(_in_a_row(n), n, reduced.shape[1], variance)
    chosen = np.arange(n)
    if n > LANDMARKS:
        chosen = np.sort(np.random.default_rng(seed).choice(n, LANDMARKS, replace=False))
    laid = _umap(reduced[chosen], seed)
    xy = laid if n == len(chosen) else _placed(reduced, reduced[chosen], laid)
    xy[chosen] = laid
    return Projection(xy, len(chosen), reduced.shape[1], variance)


def principal_components(vectors: np.ndarray, n: int = COMPONENTS) -> tuple[np.ndarray, float]:
    """Return the first principal components, float32, (points, n), and the share of the variance that they hold."""
    mean = vectors.mean(axis=0, dtype=np.float64)
    centred = vectors - mean.astype(np.float32)
    covariance = np.zeros((vectors.shape[1], vectors.shape[1]))
    for start in range(0, len(centred), BLOCK):
        part = centred[start : start + BLOCK]
        covariance += part.T @ part
    values, axes = np.linalg.eigh(covariance)
    order = np.argsort(-values)[: min(n, *vectors.shape)]
    total = values.sum()
    axes = axes[:, order]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])  # eigenvectors have no direction
    return centred @ axes.astype(np.float32), float(values[order].sum() / total) if total > 0 else 1.0


def _umap(x: np.ndarray, seed: int) -> np.ndarray:
    keep_compiled_umap()
    adata = ad.AnnData(np.ascontiguousarray(x))
    neighbours = min(NEIGHBOURS, len(x) - 1)
    # exact neighbours: the approximate search compiles for longer than this takes
    sc.pp.neighbors(adata, n_neighbors=neighbours, use_rep="X", transformer="sklearn", random_state=seed)
    # spectral layouts need more points than dimensions, and are slow; UMAP starts from the first two components
    start = x[:, :2] if x.shape[1] > 1 else np.column_stack([x, np.zeros(len(x))])
    adata.obsm["start"] = (10 * start / max(float(np.abs(start).max()), 1e-9)).astype(np.float32)
    sc.tl.umap(adata, init_pos="start", maxiter=EPOCHS, random_state=seed)
    return adata.obsm["X_umap"].astype(np.float32)


def _placed(x: np.ndarray, landmarks: np.ndarray, laid: np.ndarray) -> np.ndarray:
    """Place each point between its nearest landmarks, the nearer the closer."""
    xy = np.empty((len(x), 2), np.float32)
    norms = (landmarks * landmarks).sum(axis=1)
    k = min(PLACED_BY, len(landmarks))
    for start in range(0, len(x), BLOCK):
        part = x[start : start + BLOCK]
        nearness = part @ landmarks.T  # minus half of the squared distance, without the part's own norms
        nearness -= norms / 2
        nearest = largest(nearness, k)
        own = (part * part).sum(axis=1)[:, None]
        squared = np.maximum(own - 2 * np.take_along_axis(nearness, nearest, axis=1), 1e-9)
        weight = 1 / squared
        weight /= weight.sum(axis=1, keepdims=True)
        xy[start : start + BLOCK] = np.einsum("nk,nkd->nd", weight, laid[nearest])
    return xy


def _in_a_row(n: int) -> np.ndarray:
    return np.column_stack([np.arange(n), np.zeros(n)]).astype(np.float32)

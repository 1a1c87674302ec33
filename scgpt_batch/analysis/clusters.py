"""Neighbour graphs and Leiden clusters of vectors, as scanpy builds them, without GPL libraries.

`scanpy.tl.leiden` needs leidenalg or igraph, which are GPL; graspologic-native is MIT. On scanpy's symmetric graph both
maximise the same quality: modularity with a resolution.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from typing import Any

import anndata as ad
import numpy as np
import scanpy as sc
import scipy.sparse as sp

from scgpt_batch.errors import ConfigError, install

ITERATIONS = 20  # Leiden cycles; a partition rarely changes after ten

# What numba compiles for UMAP's graph and layout: 5 of the seconds that a process takes for its first map.
COMPILED = {
    "umap.umap_": ("smooth_knn_dist", "compute_membership_strengths"),
    "umap.layouts": ("clip", "rdist"),
}


def keep_compiled_umap() -> None:
    """Have numba keep on disk what it compiles of umap, which does not ask for it; later processes load it."""
    for module, names in COMPILED.items():
        functions = import_module(module)
        for name in names:
            if (compiler := getattr(functions, name, None)) is not None:  # other versions may have other functions
                with suppress(RuntimeError):  # no folder is writable: each process compiles, as without this
                    compiler.enable_caching()


def neighbor_graph(vectors: np.ndarray, *, n_neighbors: int = 15, seed: int = 0) -> sp.csr_matrix:
    """Return the UMAP connectivities of each vector's nearest neighbours, as `scanpy.pp.neighbors` does.

    Parameters
    ----------
    vectors
        float, (n, d).
    n_neighbors
        Of each vector, itself included; euclidean. Exact below 8,192 vectors, else approximate (pynndescent).
    seed
        Of the approximate search.

    Returns
    -------
    csr_matrix
        Symmetric weights in [0, 1], n × n.

    Examples
    --------
    >>> vectors = np.random.default_rng(0).normal(size=(30, 8))
    >>> neighbor_graph(vectors, n_neighbors=5).shape
    (30, 30)
    """
    keep_compiled_umap()
    adata = ad.AnnData(np.ascontiguousarray(vectors, dtype=np.float32))
    sc.pp.neighbors(adata, n_neighbors=min(n_neighbors, len(vectors) - 1), use_rep="X", random_state=seed)
    return sp.csr_matrix(adata.obsp["connectivities"])


def leiden(graph: sp.csr_matrix, *, resolution: float, seed: int = 0) -> np.ndarray:
    """Return the Leiden cluster of each node.

    Parameters
    ----------
    graph
        Symmetric weights, n × n.
    resolution
        Larger values give more and smaller clusters.
    seed
        The same seed gives the same clusters.

    Returns
    -------
    ndarray
        int64, (n,), numbered by size from 0.

    Raises
    ------
    ConfigError
        graspologic-native is not installed.

    Examples
    --------
    >>> vectors = np.repeat([[0.0, 0.0], [9.0, 9.0]], 20, axis=0) + np.random.default_rng(0).normal(size=(40, 2))
    >>> clusters = leiden(neighbor_graph(vectors, n_neighbors=10), resolution=0.5)
    >>> bool(clusters[0] == clusters[19] != clusters[20])
    True
    """
    graph = sp.csr_matrix(graph)
    graph.sort_indices()
    _, found = _graspologic().leiden_csr(
        graph.indptr.astype(np.int64), graph.indices.astype(np.int32), graph.data.astype(np.float64), graph.shape[0],
        resolution=float(resolution), iterations=ITERATIONS, seed=seed,
    )  # fmt: skip
    labels = np.array([found.get(i, -1) for i in range(graph.shape[0])], np.int64)
    alone = labels < 0  # nodes without an edge
    labels[alone] = labels.max(initial=-1) + 1 + np.arange(alone.sum())
    _, labels = np.unique(labels, return_inverse=True)
    by_size = np.argsort(-np.bincount(labels), kind="stable")
    number = np.empty(len(by_size), np.int64)
    number[by_size] = np.arange(len(by_size))
    return number[labels]


def leiden_runs(graph: sp.csr_matrix, runs: Iterable[tuple[float, int]]) -> list[np.ndarray]:
    """Return the clusters of each run, a pair of resolution and seed, as `leiden` does; one run per core at a time.

    Examples
    --------
    >>> vectors = np.repeat([[0.0, 0.0], [9.0, 9.0]], 20, axis=0) + np.random.default_rng(0).normal(size=(40, 2))
    >>> runs = leiden_runs(neighbor_graph(vectors, n_neighbors=10), [(0.5, 0), (0.5, 1)])
    >>> [len(np.unique(clusters)) for clusters in runs]
    [2, 2]
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # graspologic-native works outside Python's lock
        return list(threads.map(lambda run: leiden(graph, resolution=run[0], seed=run[1]), runs))


def _graspologic() -> Any:
    try:
        import graspologic_native
    except ModuleNotFoundError as exc:
        raise ConfigError(f"Leiden clusters need graspologic-native: {install('report')}") from exc
    return graspologic_native

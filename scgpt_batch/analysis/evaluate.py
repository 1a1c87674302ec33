"""Are embeddings any good on these cells and genes? Figures beside a baseline, by the definitions of scIB.

Foundation models do not always beat simple methods. Each figure for cells is therefore reported together with the same
figure for HVG + PCA of these cells. Definitions: Luecken et al. 2022 (Nature Methods, scIB); silhouettes and scores are
scikit-learn's.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_samples
from sklearn.model_selection import StratifiedKFold

from scgpt_batch.analysis.annotate import Neighbors, nearest_cells, transfer_labels
from scgpt_batch.analysis.clusters import leiden_runs, neighbor_graph
from scgpt_batch.errors import ConfigError

K = 15
FOLDS = 5
RESOLUTIONS = tuple(round(0.2 * i, 1) for i in range(1, 11))  # of Leiden; scIB takes the best of these too
SILHOUETTE_CELLS = 10_000  # at most: distances of all pairs
BASELINE_GENES, BASELINE_COMPONENTS = 2_000, 50

# Genes that belong together whatever the tissue: pattern of their symbols
FAMILIES: Mapping[str, str] = {
    "ribosomal": r"RP[LS]\d+[AXYL]?\d*",
    "HLA": r"HLA-\w+",
    "mitochondrial": r"MT-\w+",
    "collagen": r"COL\d+A\d+",
    "keratin": r"KRT\d+\w?",
    "histone": r"(HIST\d\w+|H[1-4][A-Z]?-?\d*\w*|H2[AB]\w+)",
    "CD3": r"CD3[DEG]|CD247",
}


@dataclass(frozen=True)
class Comparison:
    """Figures of an embedding and of HVG + PCA.

    Attributes
    ----------
    table
        One row per metric (all are better when larger): metric, embedding, baseline, difference.
    verdict
        One sentence.
    """

    table: pd.DataFrame
    verdict: str


def cell_metrics(
    vectors: np.ndarray,
    labels: Sequence[str] | np.ndarray,
    *,
    batches: Sequence[str] | np.ndarray | None = None,
    k: int = K,
    seed: int = 0,
) -> dict[str, float]:
    """Measure how well vectors separate labels, and mix batches.

    Parameters
    ----------
    vectors
        float, (cells, d).
    labels, batches
        Of each cell.
    k
        Neighbours.

    Returns
    -------
    dict
        knn_accuracy: share of cells whose label is that of most of their k neighbours, in other folds. ari, nmi:
        agreement of labels with the best of ten Leiden partitions. asw_label: silhouette of labels, scaled to [0, 1].
        graph_connectivity: share of a label's cells in its largest connected part. With batches, asw_batch: 1 -
        |silhouette of batches| within labels, and avg_batch, the mean of both. avg_bio: mean of ari, nmi and asw_label.

    Raises
    ------
    ConfigError
        There are fewer than two labels, or a label has fewer cells than there are folds.

    Examples
    --------
    >>> vectors = np.repeat([[9.0, 0.0], [0.0, 9.0]], 40, axis=0) + np.random.default_rng(0).normal(size=(80, 2))
    >>> cell_metrics(vectors, ["B"] * 40 + ["T"] * 40)["knn_accuracy"]
    1.0
    """
    x = np.asarray(vectors, np.float32)
    codes, names = pd.factorize(np.asarray(labels, dtype=object), sort=True)
    sizes = np.bincount(codes, minlength=len(names))
    if len(codes) != len(x):
        raise ConfigError(f"{len(codes)} labels are given for {len(x)} cells")
    if len(names) < 2:
        raise ConfigError("evaluation needs cells of at least two labels")
    if sizes.min() < FOLDS:
        raise ConfigError(f"label {names[sizes.argmin()]!r} has {sizes.min()} cells; each needs at least {FOLDS}")
    graph = neighbor_graph(x, n_neighbors=k, seed=seed)
    partitions = leiden_runs(graph, [(resolution, seed) for resolution in RESOLUTIONS])
    nmi = [normalized_mutual_info_score(codes, partition) for partition in partitions]
    best = partitions[int(np.argmax(nmi))]
    sampled = _sample(codes, seed)
    found = {
        "knn_accuracy": _knn_accuracy(x, codes, min(k, len(x) // FOLDS), seed),
        "ari": float(adjusted_rand_score(codes, best)),
        "nmi": float(max(nmi)),
        "asw_label": float((silhouette_samples(x[sampled], codes[sampled]).mean() + 1) / 2),
        "graph_connectivity": _connectivity(graph, codes),
    }
    found["avg_bio"] = float(np.mean([found["ari"], found["nmi"], found["asw_label"]]))
    if batches is not None:
        of_batch, _ = pd.factorize(np.asarray(batches, dtype=object))
        found["asw_batch"] = _batch_mixing(x[sampled], codes[sampled], of_batch[sampled])
        found["avg_batch"] = float(np.mean([found["graph_connectivity"], found["asw_batch"]]))
    return found


def hvg_pca(adata: ad.AnnData, *, batch_key: str | None = None, seed: int = 0) -> np.ndarray:
    """Return the baseline's vectors: 50 principal components of 2,000 variable genes of log-normalised counts.

    Parameters
    ----------
    adata
        Cells × genes, raw counts in X. It is not changed.
    batch_key
        Column of obs: variable genes are chosen within each batch.
    seed
        Of the components.

    Returns
    -------
    ndarray
        float32, cells × 50.

    Examples
    --------
    >>> hvg_pca(adata).shape[0] == adata.n_obs
    True
    """
    work = ad.AnnData(sp.csr_matrix(adata.X, dtype=np.float32), obs=adata.obs.copy(), var=adata.var[[]].copy())
    sc.pp.filter_genes(work, min_cells=1)
    sc.pp.normalize_total(work, target_sum=1e4)
    sc.pp.log1p(work)
    if work.n_vars > BASELINE_GENES:
        sc.pp.highly_variable_genes(work, n_top_genes=BASELINE_GENES, batch_key=batch_key)
        work = work[:, work.var["highly_variable"]].copy()
    sc.pp.pca(work, n_comps=min(BASELINE_COMPONENTS, min(work.shape) - 1), random_state=seed)
    return work.obsm["X_pca"]


def compare(
    vectors: np.ndarray,
    adata: ad.AnnData,
    label_key: str,
    *,
    batch_key: str | None = None,
    k: int = K,
    seed: int = 0,
) -> Comparison:
    """Measure vectors and HVG + PCA of the same cells, side by side.

    Parameters
    ----------
    vectors
        float, (cells, d), in the order of `adata`.
    adata
        Raw counts in X; labels and batches in obs. Cells without a label are left out.
    label_key, batch_key
        Columns of obs.
    k, seed
        Neighbours, and seed of the folds and clusters.

    Returns
    -------
    Comparison
        Its table has one row per metric; all are better when larger.

    Examples
    --------
    >>> comparison = compare(adata.obsm["X_scGPT"], adata, "cell_type")
    >>> comparison.table.columns.tolist()
    ['metric', 'embedding', 'baseline', 'difference']
    """
    for column in filter(None, (label_key, batch_key)):
        if column not in adata.obs:
            raise ConfigError(f"{column!r} is not a column of obs; its columns: {', '.join(map(repr, adata.obs))}")
    kept = adata.obs[label_key].notna().to_numpy() & np.isfinite(vectors).all(axis=1)
    cells = adata[kept]
    labels = cells.obs[label_key].astype(str).to_numpy()
    batches = cells.obs[batch_key].astype(str).to_numpy() if batch_key else None
    ours = cell_metrics(vectors[kept], labels, batches=batches, k=k, seed=seed)
    theirs = cell_metrics(hvg_pca(cells, batch_key=batch_key, seed=seed), labels, batches=batches, k=k, seed=seed)
    table = pd.DataFrame({"metric": list(ours), "embedding": list(ours.values()), "baseline": list(theirs.values())})
    table["difference"] = table["embedding"] - table["baseline"]
    return Comparison(table, verdict(ours, theirs, f"these {int(kept.sum()):,} cells"))


def verdict(ours: Mapping[str, float], theirs: Mapping[str, float], cells: str = "these cells") -> str:
    """Say in a sentence whether an embedding or the baseline is better.

    Parameters
    ----------
    ours, theirs
        Figures of `cell_metrics`.
    cells
        Which cells were measured, in words.
    """
    difference = ours["avg_bio"] - theirs["avg_bio"]
    how = "about as well as" if abs(difference) < 0.02 else "better than" if difference > 0 else "worse than"
    return (
        f"On {cells} the embedding separates the labels {how} HVG + PCA: average of ARI, NMI and "
        f"silhouette {ours['avg_bio']:.2f} against {theirs['avg_bio']:.2f}, neighbours' labels right for "
        f"{ours['knn_accuracy']:.0%} against {theirs['knn_accuracy']:.0%} of the cells."
    )


def gene_family_recall(vectors: pd.DataFrame, *, k: int = 10, n_permutations: int = 20, seed: int = 0) -> pd.DataFrame:
    """Measure whether genes of a family are each other's neighbours, against permuted names.

    Parameters
    ----------
    vectors
        Genes × d, indexed by symbol.

    Returns
    -------
    DataFrame
        One row per family with at least three genes here: family, genes, recall (share of a gene's k nearest genes, or
        of the rest of the family if that is smaller, that belong to the family, 0 to 1) and permuted, its mean over
        permuted names.

    Examples
    --------
    >>> vectors = pd.DataFrame(np.eye(6), index=["CD3D", "CD3E", "CD3G", "LYZ", "NKG7", "MS4A1"])
    >>> gene_family_recall(vectors)["family"].tolist()
    ['CD3']
    """
    x = vectors.to_numpy(np.float32)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    rows = []
    for family, pattern in FAMILIES.items():
        of_family = np.array([re.fullmatch(pattern, str(name)) is not None for name in vectors.index])
        if of_family.sum() < 3:
            continue
        permuted = [_recall(unit, rng.permutation(of_family), k) for _ in range(n_permutations)]
        rows.append((family, int(of_family.sum()), _recall(unit, of_family, k), float(np.mean(permuted))))
    return pd.DataFrame(rows, columns=["family", "genes", "recall", "permuted"])


def drift(old: np.ndarray, new: np.ndarray, *, k: int = K) -> dict[str, float]:
    """Measure how two model versions differ on the same cells (or genes), in one order.

    Returns
    -------
    dict
        mean_cosine and least_cosine of each vector with its counterpart (NaN for vectors of different lengths), and
        neighbor_overlap: the mean share of a cell's k neighbours that it keeps, 0 to 1.

    Examples
    --------
    >>> vectors = np.random.default_rng(0).normal(size=(30, 8))
    >>> round(drift(vectors, vectors)["mean_cosine"], 3)
    1.0
    """
    if len(old) != len(new):
        raise ConfigError(f"{len(old)} and {len(new)} vectors: give those of the same cells, in one order")
    cosine = np.array([np.nan])
    if old.shape == new.shape:
        cosine = (old * new).sum(axis=1) / (np.linalg.norm(old, axis=1) * np.linalg.norm(new, axis=1))
    before, after = (_without_self(nearest_cells(x, x, k + 1)) for x in (old, new))
    kept = [len(np.intersect1d(a, b)) / k for a, b in zip(before, after, strict=True)]
    return {
        "mean_cosine": float(cosine.mean()), "least_cosine": float(cosine.min()),
        "neighbor_overlap": float(np.mean(kept)),
    }  # fmt: skip


def _sample(codes: np.ndarray, seed: int) -> np.ndarray:
    """Positions of at most SILHOUETTE_CELLS cells, of each label in proportion."""
    if len(codes) <= SILHOUETTE_CELLS:
        return np.arange(len(codes))
    rng = np.random.default_rng(seed)
    share = SILHOUETTE_CELLS / len(codes)
    parts = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    return np.sort(np.concatenate([rng.choice(p, max(2, int(len(p) * share)), replace=False) for p in parts]))


def _knn_accuracy(x: np.ndarray, codes: np.ndarray, k: int, seed: int) -> float:
    right = 0
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(x, codes):
        found = transfer_labels(nearest_cells(x[test], x[train], k), codes[train])
        right += int((found["label"].to_numpy() == codes[test]).sum())
    return right / len(codes)


def _connectivity(graph: sp.csr_matrix, codes: np.ndarray) -> float:
    shares = []
    for code in range(codes.max() + 1):
        members = np.flatnonzero(codes == code)
        _, parts = connected_components(graph[members][:, members], directed=False)
        shares.append(np.bincount(parts).max() / len(members))
    return float(np.mean(shares))


def _batch_mixing(x: np.ndarray, codes: np.ndarray, batches: np.ndarray) -> float:
    scores = []
    for code in range(codes.max() + 1):
        members = codes == code
        n_batches = len(np.unique(batches[members]))
        if 1 < n_batches < members.sum():
            scores.append(float((1 - np.abs(silhouette_samples(x[members], batches[members]))).mean()))
    return float(np.mean(scores)) if scores else float("nan")


def _recall(unit: np.ndarray, of_family: np.ndarray, k: int) -> float:
    members = np.flatnonzero(of_family)
    similarity = unit[members] @ unit.T
    similarity[np.arange(len(members)), members] = -np.inf
    top = np.argpartition(-similarity, min(k, len(unit) - 1) - 1, axis=1)[:, :k]
    return float(of_family[top].sum(axis=1).mean() / min(k, len(members) - 1))


def _without_self(neighbors: Neighbors) -> list[np.ndarray]:
    return [row[row != i][: len(row) - 1] for i, row in enumerate(neighbors.index)]

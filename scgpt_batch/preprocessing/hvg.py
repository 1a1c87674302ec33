"""Selection of highly variable genes from the mean and variance of each gene.

It is used for samples whose cells are never gathered on one machine, and for "cell_ranger" on single rows, where it
avoids the cost of scanpy's tables. It applies the formulas of `scanpy.pp.highly_variable_genes` (1.10 to 1.12) in the
same order (see NOTICE). The only difference: sums over a sample are exact here, but rounded in scanpy, so genes with
equal variance up to that rounding can be ranked differently.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy import ndimage
from scipy.stats import norm as normal
from skmisc.loess import loess

from scgpt_batch.errors import PreprocessError
from scgpt_batch.preprocessing.sample_selection import BatchFit

MEAN_BINS, SPAN = 20, 0.3  # scanpy's defaults
# Requirements of the curve fit: the span must contain a point (4 genes), and a parabola has 3 coefficients (3 means)
MIN_POINTS, MIN_MEANS = 4, 3
MAD_SCALE = normal.ppf(0.75)  # median absolute deviation of a normal distribution, in standard deviations


@dataclass(frozen=True)
class Moments:
    """Sums over the cells of one batch.

    Attributes
    ----------
    cells
        Number of cells.
    sums, squares
        Sums of the values, and of their squares, of each gene, float64, (genes,).
    """

    cells: int
    sums: np.ndarray
    squares: np.ndarray

    def mean_var(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and the unbiased variance of each gene, float64, (genes,)."""
        mean = self.sums / self.cells
        var = self.squares / self.cells - mean**2
        return mean, var * (self.cells / (self.cells - 1)) if self.cells != 1 else var


def mean_var(x: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the unbiased variance of each gene, bit-identical to scanpy: float64, (genes,).

    Like scanpy, this sums in float64, first the cells of each numba thread, then the threads. Squares are computed in
    the type of X.
    """
    n_obs, n_vars = x.shape
    threads = numba.get_num_threads()
    thread = np.repeat(np.arange(n_obs) % threads, np.diff(x.indptr))
    values = x.data if x.data.dtype.kind == "f" else x.data.astype(np.int64)  # numba computes integers in int64
    place = thread * n_vars + x.indices

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(place, values, threads * n_vars).reshape(threads, n_vars).sum(axis=0)

    return Moments(n_obs, summed(values), summed(values * values)).mean_var()


def by_dispersion(mean: np.ndarray, var: np.ndarray, n_top: int, flavor: str) -> dict[str, np.ndarray]:
    """Select genes by dispersion, normalised among genes of similar mean ("cell_ranger", "seurat").

    Parameters
    ----------
    mean, var
        Mean and variance of each gene, float64, (genes,).
    n_top
        Number of genes to select. If several genes are as dispersed as the last one, all of them are selected.
    flavor
        "cell_ranger" or "seurat".

    Returns
    -------
    scanpy's columns of `var`, each (genes,): highly_variable, means, dispersions, dispersions_norm.

    Raises
    ------
    ValueError, IndexError
        As in scanpy: the means are too similar, or there is no gene to select from.
    """
    mean = np.where(mean == 0, 1e-12, mean)
    dispersion = var / mean
    if flavor == "seurat":
        dispersion[dispersion == 0] = np.nan
        mean, dispersion = np.log1p(mean), np.log(dispersion)
        norm = _over_bins_mean(mean, dispersion)
    else:
        norm = _over_bins_median(mean, dispersion)
    ordered = np.sort(norm[~np.isnan(norm)])[::-1]
    cut = ordered[min(n_top, len(ordered)) - 1]
    chosen = np.nan_to_num(norm, nan=-np.inf) >= cut
    return {"highly_variable": chosen, "means": mean, "dispersions": dispersion, "dispersions_norm": norm}


def by_dispersion_in_batches(genes: np.ndarray, batches: Sequence[Moments], n_top: int, flavor: str) -> np.ndarray:
    """Return which genes are selected, bool, (genes,): those selected in most batches, then the most dispersed."""
    tables = []
    for moments in batches:
        expressed = moments.sums > 0
        within = Moments(moments.cells, moments.sums[expressed], moments.squares[expressed])
        table = pd.DataFrame(by_dispersion(*within.mean_var(), n_top, flavor), index=genes[expressed])
        tables.append(table.astype(float).reindex(genes, fill_value=0.0))
    together = pd.concat(tables)
    ranked = together.groupby(together.index).agg({"highly_variable": "sum", "dispersions_norm": "mean"})
    ranked = ranked.sort_values(["highly_variable", "dispersions_norm"], ascending=False, na_position="last")
    return np.isin(genes, ranked.index[:n_top])


def _over_bins_mean(mean: np.ndarray, dispersion: np.ndarray) -> np.ndarray:
    """Return dispersions as z-scores by mean and standard deviation of the gene's bin ("seurat")."""
    bins = pd.cut(pd.Series(mean), MEAN_BINS)
    stats = pd.Series(dispersion).groupby(bins, observed=True).agg(avg="mean", dev="std")
    single = stats["dev"].isna()  # for a bin with one gene, the normalised dispersion is 1
    stats.loc[single, "dev"] = stats.loc[single, "avg"]
    stats.loc[single, "avg"] = 0.0
    of_gene = stats.loc[bins]
    return (dispersion - of_gene["avg"].to_numpy()) / of_gene["dev"].to_numpy()


def _over_bins_median(mean: np.ndarray, dispersion: np.ndarray) -> np.ndarray:
    """Return dispersions normalised by median and median absolute deviation of the gene's bin ("cell_ranger")."""
    edges = np.r_[-np.inf, np.percentile(mean, np.arange(10, 105, 5)), np.inf]
    if (np.diff(edges) == 0).any():
        raise ValueError("5% of the genes or more have the same mean, so that genes cannot be binned by mean")
    bins = np.searchsorted(edges, mean)
    distance = dispersion - ndimage.median(dispersion, bins, bins)  # median of the gene's bin
    return distance / ndimage.median(np.abs(distance) / MAD_SCALE, bins, bins)


def by_curve(x: sp.csr_matrix, batches: Sequence[sp.csr_matrix], n_top: int, flavor: str) -> dict[str, np.ndarray]:
    """Select genes by variance, normalised by a fitted curve of variance over mean ("seurat_v3", "seurat_v3_paper").

    scanpy 1.12 sums batches in float32 and therefore selects other genes than 1.10 and 1.11; this equals 1.11.

    Parameters
    ----------
    x
        All cells × genes.
    batches
        The cells of each batch.
    n_top
        Number of genes to select.
    flavor
        "seurat_v3" or "seurat_v3_paper", which differ in how batches are combined.

    Returns
    -------
    scanpy's columns of `var`, each (genes,).

    Raises
    ------
    PreprocessError
        The curve cannot be fitted to a batch.
    """
    mean, var = mean_var(x)
    variances = [_variance_over_curve(batch) for batch in batches]
    ranks = _ranks(variances, n_top)
    return {
        "highly_variable": _best_ranks(ranks, n_top, flavor),
        "highly_variable_rank": ranks["rank"].to_numpy(),
        "means": mean,
        "variances": var,
        "variances_norm": np.mean(variances, axis=0),
        "highly_variable_nbatches": ranks["batches"].to_numpy(),
    }


def _variance_over_curve(x: sp.csr_matrix) -> np.ndarray:
    """Return the normalised variance of each gene in one batch, with values clipped at the bounds of the fit."""
    fit = fit_curve(x.shape[0], *mean_var(x))
    clipped = np.minimum(x.data.astype(np.float64), fit.bounds[x.indices])
    sums, squares = (np.bincount(x.indices, values, x.shape[1]) for values in (clipped, clipped**2))
    return normalized_variance(fit, Moments(fit.cells, sums, squares))


def fit_batch(moments: Moments) -> BatchFit:
    """Return seurat_v3's fit for one batch; see `fit_curve`."""
    return fit_curve(moments.cells, *moments.mean_var())


def fit_curve(cells: int, mean: np.ndarray, var: np.ndarray) -> BatchFit:
    """Return seurat_v3's fit of variance over mean for one batch.

    Raises
    ------
    PreprocessError
        The points do not determine a curve. This is checked first, because skmisc's native code ends the process if
        there are fewer than 4 points.
    """
    varying = var > 0
    with np.errstate(all="ignore"):
        x, y = np.log10(mean[varying]), np.log10(var[varying])
    means = len(np.unique(x))
    if len(x) < MIN_POINTS or means < MIN_MEANS:
        raise PreprocessError(
            f"in a batch of {cells} cells, {len(x)} genes vary, with {means} different means; the fit of variances "
            f"needs at least {MIN_POINTS} such genes and {MIN_MEANS} different means"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise PreprocessError("means or variances of genes exceed the range of float64; use counts, or rescale X")
    curve = loess(x, y, span=SPAN, degree=2)
    curve.fit()
    log_var = np.zeros(len(mean))
    log_var[varying] = curve.outputs.fitted_values
    return BatchFit(cells, mean, np.sqrt(10**log_var))


def normalized_variance(fit: BatchFit, clipped: Moments) -> np.ndarray:
    """Return the variance of each gene relative to the fit, (genes,); `clipped` are sums of the clipped values."""
    n, mean = fit.cells, fit.mean
    return (1 / ((n - 1) * np.square(fit.reg_std))) * (
        (n * np.square(mean)) + clipped.squares - 2 * clipped.sums * mean
    )


def by_normalized_variance(variances: Sequence[np.ndarray], n_top: int, flavor: str) -> np.ndarray:
    """Return which genes are selected by their normalised variance in each batch, bool, (genes,)."""
    return _best_ranks(_ranks(variances, n_top), n_top, flavor)


def _ranks(variances: Sequence[np.ndarray], n_top: int) -> pd.DataFrame:
    """Return, for each gene, the number of batches that select it ("batches") and its median rank in these ("rank")."""
    norm = np.stack(variances)
    ranks = np.argsort(np.argsort(-norm, axis=1), axis=1).astype(np.float32)
    n_batches = np.sum(ranks < n_top, axis=0)
    ranks[ranks >= n_top] = np.nan
    median = np.ma.median(np.ma.masked_invalid(ranks), axis=0).filled(np.nan)
    return pd.DataFrame({"rank": median, "batches": n_batches})


def _best_ranks(ranks: pd.DataFrame, n_top: int, flavor: str) -> np.ndarray:
    by = {"seurat_v3": (["rank", "batches"], [True, False]), "seurat_v3_paper": (["batches", "rank"], [False, True])}
    columns, ascending = by[flavor]
    best = ranks.sort_values(columns, ascending=ascending, na_position="last").index[:n_top]
    return ranks.index.isin(best)

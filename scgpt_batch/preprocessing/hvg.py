"""The choice of variable genes from each gene's mean and variance.

For samples whose cells are never in one place, and for rows by "cell_ranger", without the cost of scanpy's tables.
Equal to `scanpy.pp.highly_variable_genes` (1.10 to 1.12): the same formulas in the same order (see NOTICE). Only the
sums over a sample are not rounded here, so genes that are equally variable but for the rounding of scanpy's sums may
change places.
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
MIN_POINTS, MIN_MEANS = 4, 3  # of the curve's fit: its span must hold a point, and a parabola has 3 coefficients
MAD_SCALE = normal.ppf(0.75)  # a normal distribution's median deviation is so many standard deviations


@dataclass(frozen=True)
class Moments:
    """Sums over the cells of one batch.

    Attributes
    ----------
    cells
        How many they are.
    sums, squares
        Sums of the values and of their squares, float64, (genes,).
    """

    cells: int
    sums: np.ndarray
    squares: np.ndarray

    def mean_var(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and unbiased variance of each gene."""
        mean = self.sums / self.cells
        var = self.squares / self.cells - mean**2
        return mean, var * (self.cells / (self.cells - 1)) if self.cells != 1 else var


def mean_var(x: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and unbiased variance of each gene, equal to scanpy's bit for bit: float64, (genes,).

    scanpy adds up in float64: first the cells of each of numba's threads, then the threads. Squares have X's type.
    """
    n_obs, n_vars = x.shape
    threads = numba.get_num_threads()
    thread = np.repeat(np.arange(n_obs) % threads, np.diff(x.indptr))
    values = x.data if x.data.dtype.kind == "f" else x.data.astype(np.int64)  # as numba widens whole numbers
    place = thread * n_vars + x.indices

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(place, values, threads * n_vars).reshape(threads, n_vars).sum(axis=0)

    return Moments(n_obs, summed(values), summed(values * values)).mean_var()


def by_dispersion(mean: np.ndarray, var: np.ndarray, n_top: int, flavor: str) -> dict[str, np.ndarray]:
    """Choose by dispersion among genes of like mean ("cell_ranger", "seurat").

    Parameters
    ----------
    mean, var
        Of each gene, float64, (genes,).
    n_top
        How many genes to choose; more where several are as dispersed as the last.

    Returns
    -------
    scanpy's columns of `var`, each (genes,): highly_variable, means, dispersions, dispersions_norm.

    Raises
    ------
    ValueError, IndexError
        As scanpy, where means are too much alike or no gene is left to choose from.
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
    """Choose the genes that most batches would choose, then the most dispersed: a mask, (genes,)."""
    tables = []
    for moments in batches:
        seen = moments.sums > 0
        within = Moments(moments.cells, moments.sums[seen], moments.squares[seen])
        table = pd.DataFrame(by_dispersion(*within.mean_var(), n_top, flavor), index=genes[seen])
        tables.append(table.astype(float).reindex(genes, fill_value=0.0))
    together = pd.concat(tables)
    ranked = together.groupby(together.index).agg({"highly_variable": "sum", "dispersions_norm": "mean"})
    ranked = ranked.sort_values(["highly_variable", "dispersions_norm"], ascending=False, na_position="last")
    return np.isin(genes, ranked.index[:n_top])


def _over_bins_mean(mean: np.ndarray, dispersion: np.ndarray) -> np.ndarray:
    """Scale each gene's dispersion by mean and deviation of its bin ("seurat")."""
    bins = pd.cut(pd.Series(mean), MEAN_BINS)
    stats = pd.Series(dispersion).groupby(bins, observed=True).agg(avg="mean", dev="std")
    alone = stats["dev"].isna()  # a bin of one gene: its scaled dispersion is 1
    stats.loc[alone, "dev"] = stats.loc[alone, "avg"]
    stats.loc[alone, "avg"] = 0.0
    of_gene = stats.loc[bins]
    return (dispersion - of_gene["avg"].to_numpy()) / of_gene["dev"].to_numpy()


def _over_bins_median(mean: np.ndarray, dispersion: np.ndarray) -> np.ndarray:
    """Scale each gene's dispersion by median and median deviation of its bin ("cell_ranger")."""
    edges = np.r_[-np.inf, np.percentile(mean, np.arange(10, 105, 5)), np.inf]
    if (np.diff(edges) == 0).any():
        raise ValueError("a twentieth of the genes or more have one mean: bins of like means cannot be told apart")
    bins = np.searchsorted(edges, mean)
    distance = dispersion - ndimage.median(dispersion, bins, bins)  # of each gene's bin
    return distance / ndimage.median(np.abs(distance) / MAD_SCALE, bins, bins)


def by_curve(x: sp.csr_matrix, batches: Sequence[sp.csr_matrix], n_top: int, flavor: str) -> dict[str, np.ndarray]:
    """Choose by variance over a curve of the mean ("seurat_v3", "seurat_v3_paper").

    scanpy 1.12 adds up batches in float32, and so chooses other genes than 1.10 and 1.11; these are the sums of 1.11.

    Parameters
    ----------
    x
        All cells.
    batches
        The cells of each batch.

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
    """Return each gene's variance in one batch over the batch's curve, of values cut at its bounds."""
    fit = fit_curve(x.shape[0], *mean_var(x))
    cut = np.minimum(x.data.astype(np.float64), fit.bounds[x.indices])
    sums, squares = (np.bincount(x.indices, values, x.shape[1]) for values in (cut, cut**2))
    return normalized_variance(fit, Moments(fit.cells, sums, squares))


def fit_batch(moments: Moments) -> BatchFit:
    """Fit seurat_v3's curve to one batch; see `fit_curve`."""
    return fit_curve(moments.cells, *moments.mean_var())


def fit_curve(cells: int, mean: np.ndarray, var: np.ndarray) -> BatchFit:
    """Fit seurat_v3's curve of variance over mean to one batch.

    Raises
    ------
    PreprocessError
        The points do not determine a curve. The fit's native code must not see such points: with fewer than 4 it ends
        the process.
    """
    varying = var > 0
    with np.errstate(all="ignore"):
        x, y = np.log10(mean[varying]), np.log10(var[varying])
    means = len(np.unique(x))
    if len(x) < MIN_POINTS or means < MIN_MEANS:
        raise PreprocessError(
            f"{len(x)} genes vary between the {cells} cells of a batch, with {means} different means; the fit of "
            f"variances needs {MIN_POINTS} genes and {MIN_MEANS} means"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise PreprocessError("means or variances of genes are beyond the range of numbers: use counts, or rescale X")
    curve = loess(x, y, span=SPAN, degree=2)
    curve.fit()
    log_var = np.zeros(len(mean))
    log_var[varying] = curve.outputs.fitted_values
    return BatchFit(cells, mean, np.sqrt(10**log_var))


def normalized_variance(fit: BatchFit, clipped: Moments) -> np.ndarray:
    """Return each gene's variance over the fit's, from sums of values that were cut at the fit's bounds."""
    n, mean = fit.cells, fit.mean
    return (1 / ((n - 1) * np.square(fit.reg_std))) * (
        (n * np.square(mean)) + clipped.squares - 2 * clipped.sums * mean
    )


def by_normalized_variance(variances: Sequence[np.ndarray], n_top: int, flavor: str) -> np.ndarray:
    """Choose by normalised variance in each batch ("seurat_v3", "seurat_v3_paper"): a mask, (genes,)."""
    return _best_ranks(_ranks(variances, n_top), n_top, flavor)


def _ranks(variances: Sequence[np.ndarray], n_top: int) -> pd.DataFrame:
    """Count the batches that would choose a gene ("batches"), and take the median of its ranks there ("rank")."""
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

"""AnnData -> filtered, normalised, cut to variable genes, binned; then cells -> tokens.

The steps, their order and their surprises are those of scGPT 0.2.4 (`scgpt.preprocess.Preprocessor`,
`scgpt.data_collator`), built on scanpy. Binning and tokenising work on whole blocks of cells.
"""

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
import torch

from scgpt_batch.anndata_rows import layer_names, string_labels
from scgpt_batch.decisions import Decisions
from scgpt_batch.errors import PayloadError, PreprocessError
from scgpt_batch.parameters import Parameters
from scgpt_batch.variable_genes import by_curve, by_dispersion, mean_var

COLLATOR_BINS = 51  # upstream's data collator takes this number whatever args.json says
BLOCK = 65_536  # entries binned at once: what they need stays in the cache

# where genes cannot be chosen: scanpy's, and ours
HVG_ERRORS = (ValueError, IndexError, KeyError, ZeroDivisionError, np.linalg.LinAlgError, PreprocessError)
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Tokens:
    """Cells as token sequences, packed one after the other; each starts with `<cls>`.

    Attributes
    ----------
    genes
        Token ids, int64, (T,).
    values
        Binned values, float32, (T,); `<cls>` carries the model's pad value.
    lengths
        Tokens of each cell, int64, (B,).
    """

    genes: np.ndarray
    values: np.ndarray
    lengths: np.ndarray

    def halves(self) -> "tuple[Tokens, Tokens]":
        """Split after half of the cells."""
        cells = len(self.lengths) // 2
        at = int(self.lengths[:cells].sum())
        return (
            Tokens(self.genes[:at], self.values[:at], self.lengths[:cells]),
            Tokens(self.genes[at:], self.values[at:], self.lengths[cells:]),
        )


def preprocess(
    adata: ad.AnnData,
    parameters: Parameters,
    *,
    genes_only: bool = False,
    decisions: Decisions | None = None,
    whole_numbers: bool = False,
) -> ad.AnnData:
    """Filter genes and cells, normalise, take logs, cut to variable genes: upstream's order.

    Parameters
    ----------
    adata
        Cells × genes, X in CSR. It is changed.
    genes_only
        Leave out normalising and logs where they do not decide which genes survive (they do when they change X,
        which the choice of variable genes looks at; see `changes_x`). A cut is a view then, and var's `n_cells` tells
        how many cells carry each gene: to look at the view's X would copy it.
    decisions
        Of the sample that the row belongs to: they take the place of the row's own choice of genes. Its cells may all
        be dropped then.
    whole_numbers
        X was of an integer type (or bool) before it became float32: upstream takes its logarithms elsewhere.

    Returns
    -------
    The surviving cells × genes, with upstream's layers and scanpy's statistics in `var`.

    Raises
    ------
    PreprocessError
        No gene or cell survives, a layer or column is missing, or scanpy cannot choose variable genes.
    """
    p = parameters
    layer = _existing_layer(adata, p.use_key)
    with quiet_libraries():  # scanpy's advice (raw or not, low bins): ours is `value_warning`
        if decisions is not None:
            adata = on_sample_genes(adata, decisions)
        elif p.filter_gene_by_counts:
            adata = _cut_to_genes_with_counts(adata, p)
        if wanted := min_counts(p):
            sc.pp.filter_cells(adata, min_counts=wanted)
            if decisions is None:
                _refuse_empty(adata, f"no cell reaches {wanted:g} counts")
        genes_known = decisions is not None and decisions.final
        if adata.n_obs and not (genes_only and (genes_known or not changes_x(p, whole_numbers=whole_numbers))):
            _normalize(adata, layer, p, whole_numbers=whole_numbers)
        variable = _variable_genes(adata, p) if decisions is None else decisions.variable
    if variable is None:
        return adata
    if genes_only:
        adata.var["n_cells"] = adata.X.getnnz(axis=0)
        return adata[:, variable]
    return adata[:, variable].copy()


def min_counts(parameters: Parameters) -> float:
    """Return the least sum of values that a cell needs; 0: none."""
    return parameters.min_cell_counts or float(parameters.filter_cell_by_counts)


def on_sample_genes(adata: ad.AnnData, decisions: Decisions) -> ad.AnnData:
    """Lay a row on its sample's genes: others are left out, those that the row lacks are zero.

    Raises
    ------
    PreprocessError
        The sample has no answer.
    """
    if decisions.error:
        raise PreprocessError(f"the sample has no answer: {decisions.error}")
    genes = pd.Index(decisions.genes)
    var = adata.var.reindex(genes)
    if genes.equals(adata.var_names):
        adata.var = var
        return adata
    at = genes.get_indexer(adata.var_names)  # where each of the row's genes goes

    def laid(matrix: sp.csr_matrix) -> sp.csr_matrix:
        x = sp.csr_matrix(matrix[:, np.flatnonzero(at >= 0)])
        placed = sp.csr_matrix((x.data, at[at >= 0][x.indices], x.indptr), (x.shape[0], len(genes)))
        placed.sort_indices()
        return placed

    layers = {name: laid(adata.layers[name]) for name in layer_names(adata)}
    return ad.AnnData(laid(adata.X), obs=adata.obs, var=var, layers=layers)


def batch_labels(adata: ad.AnnData, parameters: Parameters) -> np.ndarray:
    """Return each cell's batch as a string ("" without `batch_key`, "(missing)" for null), (cells,).

    Raises
    ------
    PreprocessError
        obs lacks the column.
    """
    p = parameters
    if not (p.subset_hvg and p.batch_key):
        return np.full(adata.n_obs, "", object)
    if p.batch_key not in adata.obs:
        raise PreprocessError(f"batch_key {p.batch_key!r} is not a column of obs; its columns: {_columns(adata.obs)}")
    return string_labels(adata.obs[p.batch_key])


def check_columns(adata: ad.AnnData, parameters: Parameters) -> None:
    """Refuse a row that lacks a column of obs or a layer which the parameters name (RowError)."""
    if parameters.need_preprocess:
        _existing_layer(adata, parameters.use_key)
        batch_labels(adata, parameters)
    if parameters.group_by:
        group_labels(adata, parameters.group_by)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Ignore warnings, for one thread at a time.

    Warning filters belong to the process, and scanpy changes them too: two threads that restore them in turns could
    leave all warnings off. Nor may two threads be in numba's parallel kernels at once.
    """
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def binned_layer(adata: ad.AnnData, parameters: Parameters) -> sp.csr_matrix:
    """Return the matrix that upstream bins: the last layer that `preprocess` made (or X)."""
    p = parameters
    layer = None if p.use_key == "X" else p.use_key  # a result key "X" is a layer of that name, as upstream
    if p.normalize_total:
        layer = p.result_normed_key or layer
    if p.log1p:
        layer = p.result_log1p_key or layer
    if not adata.n_obs:  # no cell reached the cell filter: nothing was normalised
        layer = None
    return sp.csr_matrix(adata.X if layer is None else adata.layers[layer])


def value_warning(adata: ad.AnnData, *, data_is_raw: bool) -> str | None:
    """Say when the values contradict `data_is_raw`.

    A maximum above 30, or whole numbers alone, means counts. (Upstream's `check_logged` takes "no positive value below
    1" for the second, which some log-transformed cells meet too.)
    """
    data = adata.X.data
    if not len(data):
        return None
    raw = data.max() > 30 or bool((data == np.floor(data)).all())
    if raw == data_is_raw:
        return None
    seen = f"values from {data.min():g} to {data.max():g}"
    if raw:
        return f"data_is_raw is false, but X looks like counts ({seen})"
    return f"data_is_raw is true, but X looks log-transformed ({seen})"


def bin_range(
    values: np.ndarray, indptr: np.ndarray, n_bins: int = COLLATOR_BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bin each cell's positive values by the cell's own quantiles, as upstream does.

    Edges are `np.quantile(values, linspace(0, 1, n_bins - 1))` of the cell, in float64 and bit for bit. A value that
    lies on several equal edges may take any bin between `lower` and `upper`; upstream draws one.

    Parameters
    ----------
    values
        The cells' positive values one after the other, (nnz,).
    indptr
        Start of each cell in `values`, (B + 1,).
    n_bins
        Bins, of which 0 is left to zeros.

    Returns
    -------
    lower, upper
        Lowest and highest admissible bin, 1..n_bins - 1, int64, (nnz,).
    edges
        Quantiles, float64, (B, n_bins - 1); 0 for a cell without values.
    """
    lower, upper = np.empty(len(values), np.int64), np.empty(len(values), np.int64)
    edges = np.zeros((len(indptr) - 1, n_bins - 1))
    for cells, entries in _blocks(indptr, n_bins):
        block = _bin_block(values[entries], np.diff(indptr[cells.start : cells.stop + 1]), n_bins)
        lower[entries], upper[entries], edges[cells] = block
    return lower, upper, edges


def bin_values(
    values: np.ndarray, indptr: np.ndarray, gene_hashes: np.ndarray, parameters: Parameters, *, n_bins: int
) -> np.ndarray:
    """Bin as `bin_range` and settle ties by `tie_break`: float32, (nnz,).

    "random" draws uniformly, as upstream, but from the cell's own values and genes and the seed: the same cell gets
    the same bins in whatever row, order or process it comes.
    """
    bins = np.empty(len(values), np.float32)
    for cells, entries in _blocks(indptr, n_bins):
        within = indptr[cells.start : cells.stop + 1] - indptr[cells.start]
        lower, upper, _ = _bin_block(values[entries], np.diff(within), n_bins)
        if parameters.tie_break == "random":
            u = cell_noise(values[entries], within, gene_hashes[entries], parameters.seed, stream=0)
            # upstream draws ceil(u * (lo - hi) + hi) with lo = lower - 1 where the edges differ: uniform in
            # lower..upper
            u *= (upper - lower + 1).astype(np.float64)
            bins[entries] = upper - u.astype(np.int32)
        else:
            bins[entries] = upper if parameters.tie_break == "upper" else lower
    return bins


def tokenize(matrix: sp.csr_matrix, gene_ids: np.ndarray, *, cls_id: int, cls_value: float) -> Tokens:
    """Turn each cell's stored entries into tokens: `<cls>`, then the genes in the matrix's order.

    Parameters
    ----------
    matrix
        Binned values, cells × genes; an explicit zero is a token like any other.
    gene_ids
        Token id of each gene (column); none may be -1.
    """
    lengths = np.diff(matrix.indptr).astype(np.int64) + 1
    starts = np.cumsum(lengths) - lengths
    is_gene = np.ones(int(lengths.sum()), bool)
    is_gene[starts] = False
    genes, values = np.empty(len(is_gene), np.int64), np.empty(len(is_gene), np.float32)
    genes[is_gene], values[is_gene] = gene_ids[matrix.indices.astype(np.intp)], matrix.data
    genes[starts], values[starts] = cls_id, cls_value
    return Tokens(genes, values, lengths)


def sample_long_cells(indptr: np.ndarray, noise: np.ndarray, max_length: int) -> np.ndarray | None:
    """Choose max_length - 1 entries of each longer cell at random; None when no cell is longer.

    `noise` is (nnz,), from `cell_noise`; a cell keeps its smallest. Returns a mask over the entries.
    """
    lengths = np.diff(indptr)
    if lengths.max(initial=0) <= max_length - 1:
        return None
    cells = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((noise, cells))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - indptr[:-1][cells]
    return rank < max_length - 1


def cell_noise(
    values: np.ndarray, indptr: np.ndarray, gene_hashes: np.ndarray, seed: int, *, stream: int
) -> np.ndarray:
    """Draw one number in [0, 1) per entry from the seed, the gene and the whole content of the entry's cell.

    No generator state: hashes are mixed (splitmix64's finaliser), so neither the order of cells nor of genes, nor
    what else is in the block, changes a draw.

    Parameters
    ----------
    values, indptr
        The cells' values one after the other, and where each cell starts.
    gene_hashes
        A 64-bit hash of each entry's gene name, (nnz,).
    stream
        Different streams are independent.
    """
    value_bits = values.astype(np.float32, copy=False).view(np.uint32).astype(np.uint64)
    entries = _mix(gene_hashes ^ _mix(value_bits))
    totals = np.zeros(len(entries) + 1, np.uint64)
    np.cumsum(entries, out=totals[1:])  # wraps, as it may
    cells = totals[indptr[1:]] - totals[indptr[:-1]]
    salt = _mix(np.array([seed, stream], np.uint64))
    salt = _mix(salt[:1] + _mix(salt[1:] + np.uint64(0x632BE59BD9B4E019)))
    drawn = _mix(np.repeat(_mix(cells ^ salt), np.diff(indptr)) ^ gene_hashes)
    return (drawn >> np.uint64(11)).view(np.int64) * 2.0**-53


def gene_hash(names: np.ndarray) -> np.ndarray:
    """Hash gene names to 64 bits, the same in every process: read-only, (genes,)."""
    return _gene_hash(tuple(names))


@lru_cache(maxsize=4)  # the genes of a file come with each of its rows
def _gene_hash(names: tuple[str, ...]) -> np.ndarray:
    hashes = pd.util.hash_array(np.array(names, dtype=object), categorize=False)
    hashes.flags.writeable = False
    return hashes


def _mix(x: np.ndarray) -> np.ndarray:
    """Finalise as splitmix64 does (Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators)."""
    shifted = x >> np.uint64(30)
    x = x ^ shifted
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= np.right_shift(x, np.uint64(27), out=shifted)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= np.right_shift(x, np.uint64(31), out=shifted)
    return x


def _blocks(indptr: np.ndarray, n_bins: int) -> Iterator[tuple[slice, slice]]:
    """Split cells into runs whose padded size stays within BLOCK: slices of the cells and of their entries.

    A cell takes room for its entries or its bin edges, whichever are more.
    """
    start, longest = 0, n_bins
    for i, length in enumerate(np.diff(indptr).tolist()):
        longest = max(longest, length)
        if i > start and longest * (i + 1 - start) > BLOCK:
            yield slice(start, i), slice(int(indptr[start]), int(indptr[i]))
            start, longest = i, max(length, n_bins)
    if len(indptr) > 1:
        yield slice(start, len(indptr) - 1), slice(int(indptr[start]), int(indptr[-1]))


def _bin_block(values: np.ndarray, lengths: np.ndarray, n_bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bin cells of at least one entry between them; what `bin_range` returns."""
    present = np.arange(max(1, lengths.max()), dtype=np.int32) < lengths.astype(np.int32)[:, None]  # (B, L)
    ordered, order = _sort_rows(values, present, np.cumsum(lengths) - lengths)
    edges = _quantiles(ordered, lengths, n_bins - 1)
    # an edge lies below (at or below) all values from the position on that counts those below it (not above it)
    sought, among = torch.from_numpy(edges), torch.from_numpy(ordered.astype(np.float64))
    back = order[present].astype(np.intp)  # where each value came from, in ascending order within its cell
    upper, under = np.empty(len(values), np.int32), np.empty(len(values), np.int32)
    upper[back] = _edges_passed(torch.searchsorted(among, sought).numpy(), lengths)
    under[back] = _edges_passed(torch.searchsorted(among, sought, right=True).numpy(), lengths)
    under += 1
    return np.minimum(under, upper, out=under), upper, edges


def _sort_rows(values: np.ndarray, present: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lay positive numbers where `present` is True, infinity elsewhere, and sort each row; all are (B, L).

    Returns the sorted rows, and where in `values` each number stood; `starts` says where there each row begins. Bits
    of positive floats order as the floats do: with its position in the lower half of a 64-bit key, a float32 is sorted
    four times as fast as by `argsort`.
    """
    if values.dtype != np.float32:
        padded = np.full(present.shape, np.inf, values.dtype)
        padded[present] = values
        order = np.argsort(padded, axis=1)
        return np.take_along_axis(padded, order, axis=1), order + starts[:, None]
    keys = np.empty((*present.shape, 2), np.uint32)
    low, high = (0, 1) if sys.byteorder == "little" else (1, 0)
    np.add(starts[:, None].astype(np.uint32), np.arange(present.shape[1], dtype=np.uint32), out=keys[..., low])
    keys[..., high] = np.float32(np.inf).view(np.uint32)
    keys[..., high][present] = values.view(np.uint32)
    keys.view(np.uint64)[..., 0].sort(axis=1)
    return keys[..., high].view(np.float32), keys[..., low]


def _quantiles(ordered: np.ndarray, lengths: np.ndarray, n: int) -> np.ndarray:
    """Return each row's n evenly spaced quantiles, as np.quantile's linear method in its own order and types."""
    last = np.maximum(lengths[:, None] - 1, 0)
    at = last * np.linspace(0, 1, n)
    below = np.floor(at).astype(np.int64)
    a = np.take_along_axis(ordered, below, axis=1)
    b = np.take_along_axis(ordered, np.minimum(below + 1, last), axis=1)
    a[lengths == 0], b[lengths == 0] = 0, 0
    step, part = b - a, at - below
    return np.where(part >= 0.5, b - step * (1 - part), a + step * part)


def _edges_passed(positions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Count for each sorted value the edges at or before its position; cells one after the other, (nnz,)."""
    n_cells, n_edges = positions.shape
    bounds = np.concatenate([np.zeros((n_cells, 1), np.int64), positions, lengths[:, None]], axis=1)
    bounds = np.minimum(np.maximum.accumulate(bounds, axis=1), lengths[:, None])
    return np.repeat(np.tile(np.arange(n_edges + 1, dtype=np.int32), n_cells), np.diff(bounds, axis=1).ravel())


def _existing_layer(adata: ad.AnnData, use_key: str) -> str | None:
    if use_key == "X":
        return None
    if use_key not in adata.layers:
        held = ", ".join(map(repr, layer_names(adata))) or "none"
        raise PreprocessError(f"use_key {use_key!r} is not a layer of the row; its layers: {held}")
    return use_key


def changes_x(parameters: Parameters, *, whole_numbers: bool) -> bool:
    """Tell whether normalising or logs change X itself, which the choice of variable genes looks at.

    An empty result key replaces what was there before. And upstream's log layer is not a copy: with nothing between X
    and the logs, scanpy takes them in place, in X too, unless X is of an integer type, which it copies first.
    """
    p = parameters
    if p.use_key != "X":
        return False
    if p.normalize_total and p.result_normed_key:
        return False  # a layer of its own
    logs_in_place = not p.result_log1p_key or bool(p.normalize_total) or not whole_numbers
    return bool(p.normalize_total) or (p.log1p and logs_in_place)


def _normalize(adata: ad.AnnData, layer: str | None, p: Parameters, *, whole_numbers: bool) -> None:
    """Normalise and take logs into upstream's layers; an empty result key replaces the layer before."""
    if p.normalize_total:
        normed = sc.pp.normalize_total(adata, target_sum=p.normalize_total, layer=layer, inplace=False)["X"]
        layer = p.result_normed_key or layer
        _set_layer(adata, layer, normed)
    if p.log1p:
        logs_x = layer is None and changes_x(p, whole_numbers=whole_numbers)
        logged = (adata.X if layer is None else adata.layers[layer]).copy()
        layer = p.result_log1p_key or layer
        _set_layer(adata, layer, logged)
        sc.pp.log1p(adata, layer=layer)
        if logs_x and layer is not None:
            adata.X = adata.layers[layer].copy()


def _set_layer(adata: ad.AnnData, layer: str | None, matrix: sp.csr_matrix) -> None:
    if layer is None:
        adata.X = matrix
    else:
        adata.layers[layer] = matrix


def _cut_to_genes_with_counts(adata: ad.AnnData, p: Parameters) -> ad.AnnData:
    enough, adata.var["n_counts"] = sc.pp.filter_genes(adata, min_counts=p.filter_gene_by_counts, inplace=False)
    if not enough.any():
        raise PreprocessError(f"no gene reaches filter_gene_by_counts {p.filter_gene_by_counts}")
    return adata if enough.all() else adata[:, enough].copy()


def _variable_genes(adata: ad.AnnData, p: Parameters) -> np.ndarray | None:
    """Choose variable genes, with scanpy's statistics in var: a mask, (genes,); None where all are kept."""
    if not p.subset_hvg:
        return None
    labels = batch_labels(adata, p)
    if p.batch_key:
        adata.obs[p.batch_key] = pd.Categorical(labels)
    keeps_all = p.subset_hvg >= adata.n_vars  # then no choice is needed, and none that fails may fail the row
    try:
        found = _scanpys_choice(adata, labels, p)
    except HVG_ERRORS as exc:
        if keeps_all:
            return None
        raise cannot_choose(p, adata.n_obs, adata.n_vars, exc) from exc
    if keeps_all and not found.any():
        return None
    if not found.any():
        raise PreprocessError("no variable gene is left")
    return with_requested_genes(found, adata.var_names, p)


def _scanpys_choice(adata: ad.AnnData, labels: np.ndarray, p: Parameters) -> np.ndarray:
    if p.hvg_flavor.startswith("seurat_v3"):
        batches = [sp.csr_matrix(adata.X[np.flatnonzero(labels == batch)]) for batch in np.unique(labels)]
        _describe_genes(adata, by_curve(adata.X, batches, p.subset_hvg, p.hvg_flavor))
    elif p.hvg_flavor == "cell_ranger" and not p.batch_key:
        _describe_genes(adata, by_dispersion(*mean_var(adata.X), p.subset_hvg, p.hvg_flavor))
    else:
        sc.pp.highly_variable_genes(adata, n_top_genes=p.subset_hvg, batch_key=p.batch_key or None, flavor=p.hvg_flavor)
    return adata.var["highly_variable"].to_numpy(bool)


def with_requested_genes(variable: np.ndarray, genes: pd.Index, parameters: Parameters) -> np.ndarray:
    """Add the genes that the request asks for to the variable ones: a mask, (genes,)."""
    if parameters.mode == "cell" or not parameters.genes:
        return variable
    return variable | genes.isin(parameters.genes)


def _describe_genes(adata: ad.AnnData, columns: dict[str, np.ndarray]) -> None:
    for name, values in columns.items():
        adata.var[name] = values


def cannot_choose(p: Parameters, n_obs: int, n_vars: int, exc: Exception) -> PreprocessError:
    """Say what an error in the choice of variable genes means."""
    return PreprocessError(
        f"cannot choose {p.subset_hvg} variable genes ({p.hvg_flavor}) from {n_obs} cells × {n_vars} genes: "
        f"{str(exc).splitlines()[0]}. Use seurat_v3 for counts and cell_ranger or seurat for log values, rows of more "
        "cells, or subset_hvg 0"
    )


def _refuse_empty(adata: ad.AnnData, why: str) -> None:
    if not (adata.n_obs and adata.n_vars):
        raise PreprocessError(why)


def _columns(obs: pd.DataFrame) -> str:
    return ", ".join(map(repr, obs.columns)) or "it has none"


def group_labels(adata: ad.AnnData, group_by: str) -> np.ndarray:
    """Return each cell's group as a string, "(missing)" for null, (cells,); a PayloadError where obs lacks it."""
    if group_by not in adata.obs:
        raise PayloadError(f"group_by {group_by!r} is not a column of adata_obs; its columns: {_columns(adata.obs)}")
    return string_labels(adata.obs[group_by])

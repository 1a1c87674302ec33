"""Quantile bins of each cell's values, and the random draws that settle ties.

Bins equal those of scGPT 0.2.4 (`scgpt.preprocess.binning`, `scgpt.data_collator`) bit for bit, except that ties are
drawn from the cell itself instead of a global generator. Whole blocks of cells are binned at once.
"""

import sys
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from scgpt_batch.parameters import Parameters

COLLATOR_BINS = 51  # upstream's data collator takes this number whatever args.json says
BLOCK = 65_536  # entries binned at once: what they need stays in the cache


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


def bin_matrix(matrix: sp.csr_matrix, names: np.ndarray, parameters: Parameters, n_bins: int) -> sp.csr_matrix:
    """Put bins in the place of values, cells × genes; `names` are the genes', by which ties are drawn."""
    matrix = sp.csr_matrix(matrix)
    hashes = gene_hash(names)[matrix.indices.astype(np.intp)]  # numpy is twice as fast with its own index type
    bins = bin_values(matrix.data, matrix.indptr, hashes, parameters, n_bins=n_bins)
    return sp.csr_matrix((bins, matrix.indices, matrix.indptr), matrix.shape)


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

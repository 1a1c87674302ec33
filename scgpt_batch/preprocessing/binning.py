"""Quantile bins of the values of each cell, and the random choice of a bin for ties.

Bins are identical to those of scGPT 0.2.4 (`scgpt.preprocess.binning`, `scgpt.data_collator`), except for ties: their
random numbers are derived from the cell itself instead of a global generator. Blocks of cells are binned together.
"""

import sys
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from scgpt_batch.parameters import Parameters

COLLATOR_BINS = 51  # number of bins in upstream's data collator, independent of args.json
BLOCK = 65_536  # entries that are binned together; their data fits the CPU cache


def bin_range(
    values: np.ndarray, indptr: np.ndarray, n_bins: int = COLLATOR_BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the range of bins of each positive value, from the quantiles of its cell, as upstream does.

    The bin edges of a cell are exactly `np.quantile(values, linspace(0, 1, n_bins - 1))` in float64. If several edges
    equal a value, it may be in any bin between `lower` and `upper`, and upstream draws one at random.

    Parameters
    ----------
    values
        Positive values of all cells, concatenated, (nnz,).
    indptr
        Start of each cell in `values`, (B + 1,).
    n_bins
        Number of bins, including bin 0 for zeros.

    Returns
    -------
    lower, upper
        Lowest and highest possible bin, 1 to n_bins - 1, int64, (nnz,).
    edges
        Bin edges, float64, (B, n_bins - 1); 0 for a cell without values.
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
    """Return the bin of each positive value, float32, (nnz,); see `bin_range` for `values`, `indptr` and `n_bins`.

    Ties are resolved by `parameters.tie_break`. "random" draws uniformly, as upstream does, but with random numbers
    derived from the cell and the seed. A cell therefore gets the same bins in any row, order or process.

    Parameters
    ----------
    gene_hashes
        Hash of the gene name of each value, from `gene_hash`, (nnz,).
    """
    bins = np.empty(len(values), np.float32)
    for cells, entries in _blocks(indptr, n_bins):
        within = indptr[cells.start : cells.stop + 1] - indptr[cells.start]
        lower, upper, _ = _bin_block(values[entries], np.diff(within), n_bins)
        if parameters.tie_break == "random":
            u = cell_noise(values[entries], within, gene_hashes[entries], parameters.seed, stream=0)
            # upstream: ceil(u * (lo - hi) + hi) with lo = lower - 1, which is uniform over lower..upper
            u *= (upper - lower + 1).astype(np.float64)
            bins[entries] = upper - u.astype(np.int32)
        else:
            bins[entries] = upper if parameters.tie_break == "upper" else lower
    return bins


def bin_matrix(matrix: sp.csr_matrix, names: np.ndarray, parameters: Parameters, n_bins: int) -> sp.csr_matrix:
    """Return a matrix with bins instead of values, cells × genes; `names` are the names of the genes."""
    matrix = sp.csr_matrix(matrix)
    hashes = gene_hash(names)[matrix.indices.astype(np.intp)]  # indexing is twice as fast with numpy's index type
    bins = bin_values(matrix.data, matrix.indptr, hashes, parameters, n_bins=n_bins)
    return sp.csr_matrix((bins, matrix.indices, matrix.indptr), matrix.shape)


def cell_noise(
    values: np.ndarray, indptr: np.ndarray, gene_hashes: np.ndarray, seed: int, *, stream: int
) -> np.ndarray:
    """Return a pseudorandom number in [0, 1) for each entry, float64, (nnz,).

    It is a hash (splitmix64's finaliser) of the seed, the gene, and all values and genes of the cell. It does not
    depend on the order of cells or genes, or on other cells.

    Parameters
    ----------
    values, indptr
        Values of all cells, concatenated, and the start of each cell.
    gene_hashes
        Hash of the gene name of each entry, from `gene_hash`, (nnz,).
    seed
        The seed.
    stream
        Different streams give independent numbers.
    """
    value_bits = values.astype(np.float32, copy=False).view(np.uint32).astype(np.uint64)
    entries = _mix(gene_hashes ^ _mix(value_bits))
    totals = np.zeros(len(entries) + 1, np.uint64)
    np.cumsum(entries, out=totals[1:])  # overflow is harmless: differences are exact modulo 2^64
    cells = totals[indptr[1:]] - totals[indptr[:-1]]
    salt = _mix(np.array([seed, stream], np.uint64))
    salt = _mix(salt[:1] + _mix(salt[1:] + np.uint64(0x632BE59BD9B4E019)))
    drawn = _mix(np.repeat(_mix(cells ^ salt), np.diff(indptr)) ^ gene_hashes)
    return (drawn >> np.uint64(11)).view(np.int64) * 2.0**-53


def gene_hash(names: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of each gene name, the same in every process; read-only array of shape (genes,)."""
    return _gene_hash(tuple(names))


@lru_cache(maxsize=4)  # all rows of a file have the same genes
def _gene_hash(names: tuple[str, ...]) -> np.ndarray:
    hashes = pd.util.hash_array(np.array(names, dtype=object), categorize=False)
    hashes.flags.writeable = False
    return hashes


def _mix(x: np.ndarray) -> np.ndarray:
    """Return the finaliser of splitmix64 (Steele, Lea and Flood 2014, Fast splittable pseudorandom generators)."""
    shifted = x >> np.uint64(30)
    x = x ^ shifted
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= np.right_shift(x, np.uint64(27), out=shifted)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= np.right_shift(x, np.uint64(31), out=shifted)
    return x


def _blocks(indptr: np.ndarray, n_bins: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of consecutive cells, as slices of the cells and of their entries.

    A block is padded to its longest cell (or the number of bins, if that is larger) and has at most `BLOCK` entries
    after padding, but at least one cell.
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
    """Return the same as `bin_range` for one block of cells, which must have at least one entry in total."""
    present = np.arange(max(1, lengths.max()), dtype=np.int32) < lengths.astype(np.int32)[:, None]  # (B, L)
    ordered, order = _sort_rows(values, present, np.cumsum(lengths) - lengths)
    edges = _quantiles(ordered, lengths, n_bins - 1)
    # searchsorted counts, for each edge, the values below it (or not above it); from that position on, a sorted value
    # is at or above (or strictly above) the edge
    sought, among = torch.from_numpy(edges), torch.from_numpy(ordered.astype(np.float64))
    back = order[present].astype(np.intp)  # original position of each sorted value
    upper, under = np.empty(len(values), np.int32), np.empty(len(values), np.int32)
    upper[back] = _edges_passed(torch.searchsorted(among, sought).numpy(), lengths)
    under[back] = _edges_passed(torch.searchsorted(among, sought, right=True).numpy(), lengths)
    under += 1
    return np.minimum(under, upper, out=under), upper, edges


def _sort_rows(values: np.ndarray, present: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of each cell in ascending order, padded with infinity, (B, L), and their original positions.

    The bit patterns of positive floats have the same order as the floats. A float32 is therefore sorted as the upper
    half of a 64-bit key with its position in the lower half, four times faster than with `argsort`.

    Parameters
    ----------
    values
        Positive values, concatenated.
    present
        Mask of the places that contain a value, (B, L).
    starts
        Start of each cell in `values`, (B,).
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
    """Return n evenly spaced quantiles of each row, with the same operations and types as np.quantile ("linear")."""
    last = np.maximum(lengths[:, None] - 1, 0)
    at = last * np.linspace(0, 1, n)
    below = np.floor(at).astype(np.int64)
    a = np.take_along_axis(ordered, below, axis=1)
    b = np.take_along_axis(ordered, np.minimum(below + 1, last), axis=1)
    a[lengths == 0], b[lengths == 0] = 0, 0
    step, part = b - a, at - below
    return np.where(part >= 0.5, b - step * (1 - part), a + step * part)


def _edges_passed(positions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return, for each sorted value, the number of edges at or before its position; (nnz,), cells concatenated."""
    n_cells, n_edges = positions.shape
    bounds = np.concatenate([np.zeros((n_cells, 1), np.int64), positions, lengths[:, None]], axis=1)
    bounds = np.minimum(np.maximum.accumulate(bounds, axis=1), lengths[:, None])
    return np.repeat(np.tile(np.arange(n_edges + 1, dtype=np.int32), n_cells), np.diff(bounds, axis=1).ravel())

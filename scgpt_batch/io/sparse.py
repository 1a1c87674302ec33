"""Reading rows of a stored CSR matrix, and conversion to number types that scipy supports."""

from typing import Any

import numpy as np
import scipy.sparse as sp

from scgpt_batch.errors import FileError

MAX_GAP = 8  # selected rows at most this far apart are read together, which is faster than a read for each


def native(values: np.ndarray) -> np.ndarray:
    """Return the values in the machine's byte order, and float16 as float32, which represents them exactly."""
    if values.dtype == np.float16:
        return values.astype(np.float32)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def csr_rows(group: Any, positions: np.ndarray, n_columns: int) -> sp.csr_matrix:
    """Return rows of a matrix that is stored as data, indices and indptr.

    Parameters
    ----------
    group
        Group of an HDF5 file or zarr store with the three arrays.
    positions
        Rows to read, ascending.
    n_columns
        Number of columns of the matrix.

    Raises
    ------
    FileError
        The three arrays are inconsistent.
    """
    if not len(positions):
        return sp.csr_matrix((0, n_columns), dtype=native(np.empty(0, group["data"].dtype)).dtype)
    base = int(positions[0])
    ends = np.asarray(group["indptr"][base : int(positions[-1]) + 2]).astype(np.int64)
    if len(ends) != positions[-1] - base + 2 or (np.diff(ends) < 0).any() or (np.diff(ends) > n_columns).any():
        raise FileError("indptr does not match the shape of the matrix; the file is damaged, write it again")
    runs = np.split(positions, np.flatnonzero(np.diff(positions) > MAX_GAP) + 1)
    parts = [_run(group, run, ends[run[0] - base : run[-1] - base + 2], n_columns) for run in runs]
    return sp.vstack(parts, format="csr") if len(parts) > 1 else parts[0]


def _run(group: Any, run: np.ndarray, ends: np.ndarray, n_columns: int) -> sp.csr_matrix:
    first, last = int(ends[0]), int(ends[-1])
    block = checked_csr(
        np.asarray(group["data"][first:last]),
        np.asarray(group["indices"][first:last]),
        ends - first,
        (len(ends) - 1, n_columns),
    )
    return block if len(run) == block.shape[0] else block[run - run[0]]


def checked_csr(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, shape: tuple[int, int]) -> sp.csr_matrix:
    """Return a CSR matrix made of arrays from a file.

    Raises
    ------
    FileError
        The arrays are inconsistent.
    """
    if indices.dtype.kind != "i":
        indices = indices.astype(np.int64)
    try:
        matrix = sp.csr_matrix((native(data), native(indices), indptr), shape)
        matrix.check_format(full_check=True)
    except ValueError as exc:
        raise FileError(f"data, indices and indptr of the matrix are inconsistent: {exc}; write the file anew") from exc
    return matrix

"""Rows of a stored CSR matrix, and number types that scipy can compute with."""

from typing import Any

import numpy as np
import scipy.sparse as sp

from scgpt_batch.errors import FileError

MAX_GAP = 8  # rows between two wanted ones that are read with them: one read takes as long as some of these


def native(values: np.ndarray) -> np.ndarray:
    """Return the same numbers in this machine's byte order; half precision as float32, which holds them exactly."""
    if values.dtype == np.float16:
        return values.astype(np.float32)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def csr_rows(group: Any, positions: np.ndarray, n_columns: int) -> sp.csr_matrix:
    """Read rows (in ascending order) of a matrix stored as data, indices and indptr.

    Raises
    ------
    FileError
        The three arrays do not fit each other.
    """
    if not len(positions):
        return sp.csr_matrix((0, n_columns), dtype=native(np.empty(0, group["data"].dtype)).dtype)
    base = int(positions[0])
    ends = np.asarray(group["indptr"][base : int(positions[-1]) + 2]).astype(np.int64)
    if len(ends) != positions[-1] - base + 2 or (np.diff(ends) < 0).any() or (np.diff(ends) > n_columns).any():
        raise FileError("indptr of the matrix does not fit its shape")
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
    """Build a CSR matrix of arrays that a file contains.

    Raises
    ------
    FileError
        They do not fit each other.
    """
    if indices.dtype.kind != "i":
        indices = indices.astype(np.int64)
    try:
        matrix = sp.csr_matrix((native(data), native(indices), indptr), shape)
        matrix.check_format(full_check=True)
    except ValueError as exc:
        raise FileError(f"data, indices and indptr of the matrix do not fit: {exc}") from exc
    return matrix

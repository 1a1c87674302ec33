"""Partial reads of .h5ad and .zarr files, also of an AnnData inside a MuData or SpatialData store."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scgpt_batch.errors import ConfigError, FileError
from scgpt_batch.io.annotations import is_array, open_annotations
from scgpt_batch.io.layers import choose_layer, stored_matrices
from scgpt_batch.io.sparse import checked_csr, csr_rows, native

CSR, CSC, DENSE = "csr", "csc", "dense"
_DAMAGED = "the file is damaged, write it again"

TABLES = ("tables", "table")  # folder of the tables in SpatialData: from version 0.1 on, and before
_CONTAINERS = (("mod", "rna", "modalities"), *((folder, "table", "tables") for folder in TABLES))


def anndata_group(root: Any) -> Any:
    """Return the AnnData group of a store.

    That is the store itself, the modality "rna" of a MuData store, or the table "table" of a SpatialData store. If
    there is only one modality or table, it may have any name.

    Raises
    ------
    ConfigError
        There are several modalities or tables, and none has the usual name.
    """
    if "obs" in root and "mod" not in root:
        return root
    for folder, usual, what in _CONTAINERS:
        if folder in root and not is_array(root[folder]):
            names = sorted(root[folder])
            if usual in names or len(names) == 1:
                return root[folder][usual if usual in names else names[0]]
            raise ConfigError(
                f"the store has the {what} {', '.join(names) or '(none)'}, but none named {usual!r}: save the one with "
                "the counts as an .h5ad file"
            )
    return root


class AnnDataFile:
    """An open AnnData group of an HDF5 file or zarr store.

    Attributes
    ----------
    n_obs, n_vars
        Number of cells, and of genes of the matrix.
    layer, reason
        Name of the matrix that is read, and why it was chosen.
    """

    def __init__(self, group: Any, layer: str) -> None:
        self.group = group
        self.layer, self.reason = choose_layer(group, layer)
        matrix = stored_matrices(group)[self.layer]
        uns = group.get("uns")
        self.obs_table = open_annotations(group, "obs", uns)
        self.var_table = open_annotations(matrix.home, matrix.genes, uns)
        self.node = matrix.node
        self.kind = DENSE if is_array(self.node) else _sparse_format(self.node, self.layer)
        self.n_obs, self.n_vars = self.obs_table.n, self.var_table.n
        self._check_shape()

    @property
    def is_csc(self) -> bool:
        """Whether the matrix is stored gene by gene. Reading any cell then requires a pass over the whole matrix."""
        return self.kind == CSC

    @property
    def stored_values(self) -> int:
        """Number of values that the matrix stores."""
        return int(self.node["data"].shape[0] if self.kind != DENSE else np.prod(self.node.shape))

    @property
    def uns(self) -> dict[str, Any]:
        """The part of `uns` that scanpy writes about the logarithm of X: `{"log1p": {"base": …}}`, or empty."""
        uns = self.group.get("uns")
        if uns is None or is_array(uns) or "log1p" not in uns or is_array(uns["log1p"]) or "base" not in uns["log1p"]:
            return {}
        base = uns["log1p"]["base"]
        stated = base[()] if is_array(base) and base.shape == () and base.dtype.kind in "iuf" else None
        return {} if stated is None or self.layer != "X" else {"log1p": {"base": float(stated)}}

    def columns(self, table: str) -> list[str]:
        """Return the column names of "obs" or "var"."""
        return {"obs": self.obs_table, "var": self.var_table}[table].columns

    def labels(self, column: str) -> pd.Series:
        """Return one obs column of all cells."""
        return self.obs_table.column(column)

    def names(self, positions: np.ndarray) -> np.ndarray:
        """Return the names of the cells at these positions."""
        return self.obs_table.names(positions)

    def obs(self, positions: np.ndarray) -> pd.DataFrame:
        """Return obs of the cells at these positions."""
        return self.obs_table.read(positions)

    def var(self) -> pd.DataFrame:
        """Return the table of the matrix's genes."""
        return self.var_table.read()

    def matrices(self, rows: Sequence[np.ndarray], block_values: int) -> Iterator[sp.csr_matrix]:
        """Yield the cells × genes matrix of each row.

        Parameters
        ----------
        rows
            Positions of the cells of each row, ascending.
        block_values
            How many values to read at a time from a matrix that is stored gene by gene.
        """
        if self.kind == CSC:
            cells = self._select_from_csc(np.concatenate(rows), block_values)
            ends = np.cumsum([len(positions) for positions in rows])
            yield from (cells[start:stop] for start, stop in pairwise([0, *ends]))
            return
        for positions in rows:
            if self.kind == CSR:
                yield csr_rows(self.node, positions, self.n_vars)
            else:
                yield sp.csr_matrix(native(np.asarray(self.node[_range(positions)])))

    def _select_from_csc(self, positions: np.ndarray, block_values: int) -> sp.csr_matrix:
        """Return cells of a matrix that is stored gene by gene, read in one pass over blocks of genes."""
        ends = np.asarray(self.node["indptr"][...]).astype(np.int64)
        if (np.diff(ends) < 0).any():
            raise FileError(f"indptr of {self.layer} decreases; {_DAMAGED}")
        starts = np.searchsorted(ends, np.arange(0, ends[-1], block_values), side="right") - 1
        edges = np.unique([0, *starts, self.n_vars])
        parts = []
        for first, last in pairwise(edges):
            values = slice(int(ends[first]), int(ends[last]))
            by_gene = checked_csr(
                np.asarray(self.node["data"][values]),
                np.asarray(self.node["indices"][values]),
                ends[first : last + 1] - ends[first],
                (int(last - first), self.n_obs),
            )
            parts.append(by_gene.T[positions])
        return sp.hstack(parts, format="csr")

    def _check_shape(self) -> None:
        if self.kind == DENSE:
            shape = tuple(map(int, self.node.shape))
        else:
            major = self.n_obs if self.kind == CSR else self.n_vars
            stated = self.node.attrs.get("shape", self.node.attrs.get("h5sparse_shape", (self.n_obs, self.n_vars)))
            shape = tuple(map(int, stated))
            if int(self.node["indptr"].shape[0]) != major + 1:
                found, axis = self.node["indptr"].shape[0] - 1, "cells" if self.kind == CSR else "genes"
                raise FileError(f"indptr of {self.layer} has entries for {found} {axis}, not {major}; {_DAMAGED}")
            if self.node["data"].shape != self.node["indices"].shape:
                raise FileError(f"data and indices of {self.layer} differ in length; {_DAMAGED}")
        if shape != (self.n_obs, self.n_vars):
            raise FileError(
                f"{self.layer} has the shape {' × '.join(map(str, shape))}, but obs has {self.n_obs} cells and var has "
                f"{self.n_vars} genes; {_DAMAGED}"
            )


def _sparse_format(node: Any, layer: str) -> str:
    stated = node.attrs.get("encoding-type") or node.attrs.get("h5sparse_format") or ""
    stated = (stated.decode() if isinstance(stated, bytes) else str(stated)).removesuffix("_matrix")
    if stated not in (CSR, CSC) or not {"data", "indices", "indptr"} <= set(node):
        raise FileError(
            f"{layer} is stored as {stated or 'a group without a format'}, not as csr, csc or dense; convert it, e.g. "
            "with scipy.sparse.csr_matrix, and write the file again"
        )
    return stated


def _range(positions: np.ndarray) -> Any:
    """Return contiguous positions as a slice, which is faster to read; other positions unchanged."""
    if not len(positions):
        return slice(0, 0)
    first, last = int(positions[0]), int(positions[-1]) + 1
    return slice(first, last) if last - first == len(positions) else positions

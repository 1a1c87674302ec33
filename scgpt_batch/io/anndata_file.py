"""Cells of an .h5ad or .zarr file (or of one inside a MuData or SpatialData store): only what is asked for is read."""

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

TABLES = ("tables", "table")  # of SpatialData: today, and before version 0.1
_CONTAINERS = (("mod", "rna", "modalities"), *((folder, "table", "tables") for folder in TABLES))


def anndata_group(root: Any) -> Any:
    """Return the AnnData group of a store: the store itself, the rna of a MuData, the table of a SpatialData.

    Raises
    ------
    ConfigError
        A MuData or SpatialData store contains several, and none has the usual name.
    """
    if "obs" in root and "mod" not in root:
        return root
    for folder, usual, what in _CONTAINERS:
        if folder in root and not is_array(root[folder]):
            names = sorted(root[folder])
            if usual in names or len(names) == 1:
                return root[folder][usual if usual in names else names[0]]
            raise ConfigError(
                f"the {what} are {', '.join(names) or 'none'}, and none is called {usual!r}: save the one with the "
                "counts as an .h5ad file"
            )
    return root


class AnnDataFile:
    """An open AnnData group of HDF5 or zarr.

    Attributes
    ----------
    n_obs
        How many cells it has.
    layer, reason
        The matrix that is read, and why.
    is_csc, stored_values
        Whether the matrix is stored gene by gene, and how many values it stores.
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
        """Whether the matrix is stored gene by gene, so that any cell takes a pass over all of it."""
        return self.kind == CSC

    @property
    def stored_values(self) -> int:
        """How many values the matrix stores."""
        return int(self.node["data"].shape[0] if self.kind != DENSE else np.prod(self.node.shape))

    @property
    def uns(self) -> dict[str, Any]:
        """What `uns` says of the logarithm of X."""
        uns = self.group.get("uns")
        if uns is None or is_array(uns) or "log1p" not in uns or is_array(uns["log1p"]) or "base" not in uns["log1p"]:
            return {}
        base = uns["log1p"]["base"]
        stated = base[()] if is_array(base) and base.shape == () and base.dtype.kind in "iuf" else None
        return {} if stated is None or self.layer != "X" else {"log1p": {"base": float(stated)}}

    def columns(self, table: str) -> list[str]:
        """Name the columns of obs or var."""
        return {"obs": self.obs_table, "var": self.var_table}[table].columns

    def labels(self, column: str) -> pd.Series:
        """Read one column of obs, and no other."""
        return self.obs_table.column(column)

    def names(self, positions: np.ndarray) -> np.ndarray:
        """Read the names of these cells."""
        return self.obs_table.names(positions)

    def obs(self, positions: np.ndarray) -> pd.DataFrame:
        """Read the table of these cells."""
        return self.obs_table.read(positions)

    def var(self) -> pd.DataFrame:
        """Read the table of the matrix's genes."""
        return self.var_table.read()

    def matrices(self, rows: Sequence[np.ndarray], block_values: int) -> Iterator[sp.csr_matrix]:
        """Read the matrix of each row's cells; of a matrix stored by gene, `block_values` at a time."""
        if self.kind == CSC:
            every = self._pass_by_gene(np.concatenate(rows), block_values)
            ends = np.cumsum([len(positions) for positions in rows])
            yield from (every[start:stop] for start, stop in pairwise([0, *ends]))
            return
        for positions in rows:
            if self.kind == CSR:
                yield csr_rows(self.node, positions, self.n_vars)
            else:
                yield sp.csr_matrix(native(np.asarray(self.node[_range(positions)])))

    def _pass_by_gene(self, positions: np.ndarray, block_values: int) -> sp.csr_matrix:
        """Pick cells from a matrix that is stored gene by gene: one pass over it, in blocks of genes."""
        ends = np.asarray(self.node["indptr"][...]).astype(np.int64)
        if (np.diff(ends) < 0).any():
            raise FileError("indptr of the matrix does not fit its shape")
        starts = np.searchsorted(ends, np.arange(0, ends[-1], block_values), side="right") - 1
        edges = np.unique([0, *starts, self.n_vars])
        parts = []
        for first, last in pairwise(edges):
            values = slice(int(ends[first]), int(ends[last]))
            is_csc = checked_csr(
                np.asarray(self.node["data"][values]),
                np.asarray(self.node["indices"][values]),
                ends[first : last + 1] - ends[first],
                (int(last - first), self.n_obs),
            )
            parts.append(is_csc.T[positions])
        return sp.hstack(parts, format="csr")

    def _check_shape(self) -> None:
        if self.kind == DENSE:
            shape = tuple(map(int, self.node.shape))
        else:
            major = self.n_obs if self.kind == CSR else self.n_vars
            stated = self.node.attrs.get("shape", self.node.attrs.get("h5sparse_shape", (self.n_obs, self.n_vars)))
            shape = tuple(map(int, stated))
            if int(self.node["indptr"].shape[0]) != major + 1:
                raise FileError(f"{self.layer} has {self.node['indptr'].shape[0] - 1} rows, not {major}")
            if self.node["data"].shape != self.node["indices"].shape:
                raise FileError(f"data and indices of {self.layer} differ in length")
        if shape != (self.n_obs, self.n_vars):
            raise FileError(
                f"{self.layer} is {' × '.join(map(str, shape))}, but obs has {self.n_obs} cells and var "
                f"{self.n_vars} genes"
            )


def _sparse_format(node: Any, layer: str) -> str:
    stated = node.attrs.get("encoding-type") or node.attrs.get("h5sparse_format") or ""
    stated = (stated.decode() if isinstance(stated, bytes) else str(stated)).removesuffix("_matrix")
    if stated not in (CSR, CSC) or not {"data", "indices", "indptr"} <= set(node):
        raise FileError(f"{layer} is stored as {stated or 'a group without a format'}, not as csr, csc or dense")
    return stated


def _range(positions: np.ndarray) -> Any:
    """Express neighbouring positions as a slice, which files read faster."""
    if not len(positions):
        return slice(0, 0)
    first, last = int(positions[0]), int(positions[-1]) + 1
    return slice(first, last) if last - first == len(positions) else positions

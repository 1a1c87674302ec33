"""Partial reads of obs and var from .h5ad and .zarr files, in all layouts that anndata and R packages have written.

anndata's own partial readers do not support the older layouts: they return whole columns, which do not match the
selected rows.
"""

from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.io import read_elem

from scgpt_batch.errors import FileError

_DAMAGED = "the file is damaged, write it again"
_CATEGORIES = "_categories"  # anndata 0.6 stores the categories of an integer column in uns["<column>_categories"]


def open_annotations(group: Any, key: str, uns: Any = None) -> "Annotations | CompoundAnnotations":
    """Return a reader for the table `key` of a group.

    Parameters
    ----------
    group, key
        Location of the table, such as the open file and "obs".
    uns
        The file's `uns`, where anndata 0.6 stored categories.

    Raises
    ------
    FileError
        The table is missing, is not a table, or has no row names.
    """
    if key not in group:
        raise FileError(f"there is no {key}; is it an AnnData file?")
    node = group[key]
    if is_array(node):
        if not node.dtype.names:
            raise FileError(f"{key} is an array of {node.dtype}, not a table; write the file again with anndata")
        return CompoundAnnotations(node, key, uns)
    return Annotations(node, key)


def is_array(node: Any) -> bool:
    """Return whether a node of a file is an array rather than a group."""
    return isinstance(node, (h5py.Dataset, zarr.Array))


class Annotations:
    """A table stored as a group of columns: anndata from 0.7 on, and R packages, which omit some attributes."""

    def __init__(self, group: Any, key: str) -> None:
        self.group, self.key = group, key
        self._index = self._index_key()
        order = group.attrs.get("column-order")
        if order is None:  # SeuratDisk
            self.columns = [str(name) for name in group if name not in (self._index, "__categories")]
        else:
            self.columns = _texts(order)
        for name in self.columns:
            if name not in group:
                raise FileError(f"{key} lists the column {name!r}, but does not contain it; {_DAMAGED}")
        self.n = self._length(self._index)

    def names(self, positions: np.ndarray | None = None) -> np.ndarray:
        """Return the row names as strings; by default of all rows."""
        return _as_names(self._read(self._index, positions))

    def column(self, name: str, positions: np.ndarray | None = None) -> pd.Series:
        """Return one column; by default of all rows."""
        return pd.Series(self._read(name, positions), name=name)

    def read(self, positions: np.ndarray | None = None) -> pd.DataFrame:
        """Return all columns, indexed by the row names; by default of all rows."""
        return _table({name: self._read(name, positions) for name in self.columns}, self.names(positions), self.key)

    def _index_key(self) -> str:
        stated = self.group.attrs.get("_index")
        candidates = _texts(stated) if stated is not None else ["_index", "index"]
        for name in candidates:
            if name in self.group:
                return name
        raise FileError(f"{self.key} has no row names ({' or '.join(candidates)}); {_DAMAGED}")

    def _length(self, name: str) -> int:
        node = self.group[name]
        if not is_array(node):
            node = node["codes" if "codes" in node else "values"]
        return int(node.shape[0])

    def _read(self, name: str, positions: np.ndarray | None) -> Any:
        where = f"{self.key}[{name!r}]"
        try:
            values = _column(self.group[name], self.group, positions)
        except FileError as exc:
            raise FileError(f"{where}: {exc}") from exc
        except Exception as exc:  # h5py, zarr and anndata raise many exception types for damaged data
            raise FileError(f"{where} cannot be read: {type(exc).__name__}: {exc}") from exc
        wanted = self.n if positions is None else len(positions)
        if len(values) != wanted:
            raise FileError(f"{where} has {len(values)} values for {wanted} rows; {_DAMAGED}")
        return values


class CompoundAnnotations:
    """A table stored as one array of records: anndata 0.6 and older."""

    def __init__(self, records: Any, key: str, uns: Any) -> None:
        self.records, self.key, self.uns = records, key, uns
        self._index, *self.columns = records.dtype.names
        self.n = int(records.shape[0])

    def names(self, positions: np.ndarray | None = None) -> np.ndarray:
        """Return the row names as strings; by default of all rows."""
        return _as_names(_as_values(self._take(positions)[self._index]))

    def column(self, name: str, positions: np.ndarray | None = None) -> pd.Series:
        """Return one column; by default of all rows."""
        return pd.Series(self._values(name, self._take(positions)), name=name)

    def read(self, positions: np.ndarray | None = None) -> pd.DataFrame:
        """Return all columns, indexed by the row names; by default of all rows."""
        records = self._take(positions)
        values = {name: self._values(name, records) for name in self.columns}
        return _table(values, _as_names(_as_values(records[self._index])), self.key)

    def _take(self, positions: np.ndarray | None) -> np.ndarray:
        return _take(self.records, positions)

    def _values(self, name: str, records: np.ndarray) -> Any:
        values = records[name]
        if values.ndim > 1:
            return pd.Series(list(values), dtype=object)
        categories = self._categories(name, values.dtype)
        return _as_values(values) if categories is None else _categorical(values, categories)

    def _categories(self, name: str, dtype: np.dtype) -> np.ndarray | None:
        """Return the column's categories if `uns` has one for each of its codes, else None."""
        key = f"{name}{_CATEGORIES}"
        if dtype.kind not in "iu" or self.uns is None or is_array(self.uns) or key not in self.uns:
            return None
        categories = np.atleast_1d(_as_values(np.asarray(self.uns[key])))
        codes = np.asarray(self.records[name] if isinstance(self.records, h5py.Dataset) else self.records[:][name])
        return categories if codes.max(initial=-1) < len(categories) else None


def _table(values: dict[str, Any], names: np.ndarray, key: str) -> pd.DataFrame:
    for name, column in values.items():
        if len(column) != len(names):
            raise FileError(f"{key}[{name!r}] has {len(column)} values for {len(names)} names; {_DAMAGED}")
    return pd.DataFrame(values, index=pd.Index(names, dtype=object))


def _column(node: Any, table: Any, positions: np.ndarray | None) -> Any:
    """Read a column; its attributes and members tell which layout it has."""
    if is_array(node):
        if "categories" not in node.attrs:
            return _as_values(_take(node, positions))
        reference = node.attrs["categories"]  # anndata 0.7: an object reference in HDF5, a path in zarr
        categories = table.file[reference] if isinstance(node, h5py.Dataset) else table[str(reference)]
        return _categorical(_take(node, positions), _as_values(categories[...]))
    members = set(node)
    if {"codes", "categories"} <= members:
        return _categorical(_take(node["codes"], positions), _column(node["categories"], node, None))
    if {"values", "mask"} <= members:
        values = np.array(_as_values(_take(node["values"], positions)), dtype=object)
        values[_take(node["mask"], positions).astype(bool)] = None
        return values
    whole = pd.Series(read_elem(node))
    return whole if positions is None else whole.iloc[positions].reset_index(drop=True)


def _categorical(codes: np.ndarray, categories: np.ndarray) -> Any:
    if codes.dtype.kind not in "iu":
        raise FileError(f"category codes have the type {codes.dtype}, not integers; {_DAMAGED}")
    codes = codes.astype(np.int64)
    if codes.size and (codes.min() < -1 or codes.max() >= len(categories)):
        worst = codes.min() if codes.min() < -1 else codes.max()
        raise FileError(f"category code {worst} is out of range: there are {len(categories)} categories; {_DAMAGED}")
    named = pd.Index(categories)
    if named.is_unique and not named.hasnans:
        return pd.Categorical.from_codes(codes, named)
    labels = np.array([None if pd.isna(label) else str(label) for label in categories] + [None], dtype=object)
    return labels[codes]


def _take(array: Any, positions: np.ndarray | None) -> np.ndarray:
    """Return rows of an array, by default all; HDF5 strings are decoded."""
    if isinstance(array, h5py.Dataset) and h5py.check_string_dtype(array.dtype):
        array = array.asstr("utf-8")
    if positions is None:
        return np.asarray(array[...])
    if not len(positions):
        return np.asarray(array[:0])
    first, last = int(positions.min()), int(positions.max()) + 1
    block = np.asarray(array[first:last])
    return block if len(positions) == last - first and (np.diff(positions) == 1).all() else block[positions - first]


def _as_values(values: np.ndarray) -> np.ndarray:
    """Return string arrays of any kind as object arrays of str, and numbers unchanged."""
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8").astype(object)
    if values.dtype.kind in "UT":
        return values.astype(object)
    if values.dtype.kind == "O":
        return np.array([v.decode() if isinstance(v, bytes) else v for v in values.ravel()], object).reshape(
            values.shape
        )
    return values


def _as_names(values: Any) -> np.ndarray:
    """Return names of any type as strings; a missing name becomes an empty string."""
    if pd.api.types.infer_dtype(values, skipna=False) == "string":
        return np.asarray(values, dtype=object)
    names = np.empty(len(values), dtype=object)
    names[:] = ["" if v is None or v is pd.NA or v != v else str(v) for v in values]
    return names


def _texts(attribute: Any) -> list[str]:
    """Return an attribute, which may be one string or several, as a list."""
    if isinstance(attribute, h5py.Empty):
        return []
    values: Sequence[Any] = [attribute] if isinstance(attribute, (str, bytes)) else list(np.atleast_1d(attribute))
    return [v.decode() if isinstance(v, bytes) else str(v) for v in values]

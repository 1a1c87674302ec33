"""obs and var of an .h5ad or .zarr file, in every layout that anndata and the R packages have written.

Columns are read one by one, and only for the rows that are asked for. anndata's own partial readers do not cover the
older layouts: they return whole columns there, which no longer match the rows.
"""

from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.io import read_elem

from scgpt_batch.errors import FileError

_CATEGORIES = "_categories"  # anndata 0.6: uns["<column>_categories"] holds the categories of an integer column


def open_annotations(group: Any, key: str, uns: Any = None) -> "Annotations | CompoundAnnotations":
    """Open the table `key` of a group.

    Parameters
    ----------
    group, key
        Where the table is, such as a file and "obs".
    uns
        The file's `uns`, where anndata 0.6 stored categories.

    Raises
    ------
    FileError
        There is no such table, or it has no names.
    """
    if key not in group:
        raise FileError(f"there is no {key}")
    node = group[key]
    if is_array(node):
        if not node.dtype.names:
            raise FileError(f"{key} is an array of {node.dtype}, not a table")
        return CompoundAnnotations(node, key, uns)
    return Annotations(node, key)


def is_array(node: Any) -> bool:
    """Tell whether a node of a file is an array rather than a group."""
    return isinstance(node, (h5py.Dataset, zarr.Array))


class Annotations:
    """A table stored as a group of columns (anndata 0.7 and newer; R packages, with or without the attributes)."""

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
                raise FileError(f"{key} lists the column {name!r}, but does not contain it")
        self.n = self._length(self._index)

    def names(self, positions: np.ndarray | None = None) -> np.ndarray:
        """Read the names of these rows, as strings."""
        return _as_names(self._read(self._index, positions))

    def column(self, name: str, positions: np.ndarray | None = None) -> pd.Series:
        """Read one column of these rows."""
        return pd.Series(self._read(name, positions), name=name)

    def read(self, positions: np.ndarray | None = None) -> pd.DataFrame:
        """Read all columns of these rows, named by the rows' names."""
        return _table({name: self._read(name, positions) for name in self.columns}, self.names(positions), self.key)

    def _index_key(self) -> str:
        stated = self.group.attrs.get("_index")
        candidates = _texts(stated) if stated is not None else ["_index", "index"]
        for name in candidates:
            if name in self.group:
                return name
        raise FileError(f"{self.key} has no column of names ({' or '.join(candidates)})")

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
        except Exception as exc:  # h5py, zarr and anndata raise many types for damaged data
            raise FileError(f"{where} cannot be read: {type(exc).__name__}: {exc}") from exc
        wanted = self.n if positions is None else len(positions)
        if len(values) != wanted:
            raise FileError(f"{where} has {len(values)} values for {wanted} rows")
        return values


class CompoundAnnotations:
    """A table stored as one array of records (anndata 0.6 and older)."""

    def __init__(self, records: Any, key: str, uns: Any) -> None:
        self.records, self.key, self.uns = records, key, uns
        self._index, *self.columns = records.dtype.names
        self.n = int(records.shape[0])

    def names(self, positions: np.ndarray | None = None) -> np.ndarray:
        """Read the names of these rows, as strings."""
        return _as_names(_as_values(self._take(positions)[self._index]))

    def column(self, name: str, positions: np.ndarray | None = None) -> pd.Series:
        """Read one column of these rows."""
        return pd.Series(self._values(name, self._take(positions)), name=name)

    def read(self, positions: np.ndarray | None = None) -> pd.DataFrame:
        """Read all columns of these rows, named by the rows' names."""
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
        """Return the column's categories if `uns` holds some that fit all of its codes."""
        key = f"{name}{_CATEGORIES}"
        if dtype.kind not in "iu" or self.uns is None or is_array(self.uns) or key not in self.uns:
            return None
        categories = np.atleast_1d(_as_values(np.asarray(self.uns[key])))
        codes = np.asarray(self.records[name] if isinstance(self.records, h5py.Dataset) else self.records[:][name])
        return categories if codes.max(initial=-1) < len(categories) else None


def _table(values: dict[str, Any], names: np.ndarray, key: str) -> pd.DataFrame:
    for name, column in values.items():
        if len(column) != len(names):
            raise FileError(f"{key}[{name!r}] has {len(column)} values for {len(names)} names")
    return pd.DataFrame(values, index=pd.Index(names, dtype=object))


def _column(node: Any, table: Any, positions: np.ndarray | None) -> Any:
    """Read a column: by its stated encoding, else by its members."""
    if is_array(node):
        if "categories" not in node.attrs:
            return _as_values(_take(node, positions))
        reference = node.attrs["categories"]  # anndata 0.7: an object reference, or in zarr a path
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
        raise FileError(f"codes of categories are {codes.dtype}, not integers")
    codes = codes.astype(np.int64)
    if codes.size and (codes.min() < -1 or codes.max() >= len(categories)):
        worst = codes.min() if codes.min() < -1 else codes.max()
        raise FileError(f"code {worst} is out of range: there are {len(categories)} categories")
    named = pd.Index(categories)
    if named.is_unique and not named.hasnans:
        return pd.Categorical.from_codes(codes, named)
    labels = np.array([None if pd.isna(label) else str(label) for label in categories] + [None], dtype=object)
    return labels[codes]


def _take(array: Any, positions: np.ndarray | None) -> np.ndarray:
    """Read these rows of an array; strings of HDF5 are decoded."""
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
    """Turn every kind of string array into objects; numbers stay as they are."""
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
    """Turn an index of any type into strings; a missing name is empty."""
    if pd.api.types.infer_dtype(values, skipna=False) == "string":
        return np.asarray(values, dtype=object)
    names = np.empty(len(values), dtype=object)
    names[:] = ["" if v is None or v is pd.NA or v != v else str(v) for v in values]
    return names


def _texts(attribute: Any) -> list[str]:
    """Read an attribute that holds one string or several."""
    if isinstance(attribute, h5py.Empty):
        return []
    values: Sequence[Any] = [attribute] if isinstance(attribute, (str, bytes)) else list(np.atleast_1d(attribute))
    return [v.decode() if isinstance(v, bytes) else str(v) for v in values]

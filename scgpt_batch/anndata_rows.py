"""AnnData <-> one row of columns: the only module that knows how a row spells a matrix and its tables.

A row holds either `adata_sparsematrix` (dense, cells × genes) or `x_data`, `x_indices`, `x_indptr` (CSR), with `obs`
and `var` as JSON, `orient="split"`. All that arrives is checked before it is used.
"""

import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from scgpt_batch.errors import PayloadError

MATRIX_COLUMNS = ("adata_sparsematrix", "x_data", "x_indices", "x_indptr")
PAYLOAD_COLUMNS = (*MATRIX_COLUMNS, "adata_obs", "adata_var")
# The genes of a file or sample come with each of its rows; so many of these tables are kept, of JSON up to so many
# characters. A character takes 7 bytes (a 10x file's 33,000 genes and two columns: 9 MB) to 15 (short texts alone):
# 500 MB at most.
SHARED_TABLES, SHARED_LENGTH = 4, 8_000_000
_CSR = ("x_data", "x_indices", "x_indptr")
_NUMBER_TYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64",
)  # fmt: skip


def to_row(adata: ad.AnnData, *, layout: Literal["csr", "dense"] = "csr") -> dict[str, Any]:
    """Turn X, obs and var of an AnnData into the payload columns of a row.

    `from_row` gives the same values, names and dtype of X back. In obs and var, categoricals come back as strings,
    integers as int64, floats as float64 and missing values as NaN or None; anything else (dates, infinities) as its
    string.

    Parameters
    ----------
    adata
        Cells × genes; X dense or sparse.
    layout
        "csr" stores X as float32; "dense" as float64, every zero included.

    Raises
    ------
    PayloadError
        There is no X, or it holds values that the layout's type cannot hold exactly.
    """
    dtype = np.float32 if layout == "csr" else np.float64
    x = adata.X
    if x is None:
        raise PayloadError("the AnnData has no X")
    _number_type(x.dtype.name, "the type of X")
    if sp.issparse(x) and not x.has_canonical_format:
        x = x.copy()
        x.sum_duplicates()  # two entries of one gene are one value
    held = x.data if sp.issparse(x) else np.asarray(x)
    values = _cast(held, dtype)
    if not np.array_equal(_cast(values, held.dtype), held, equal_nan=True):
        raise PayloadError(f"X ({x.dtype}) holds values that {np.dtype(dtype).name} rounds; cast X first, or use dense")
    row: dict[str, Any] = dict.fromkeys(PAYLOAD_COLUMNS)
    if layout == "dense":
        row["adata_sparsematrix"] = list(x.toarray().astype(dtype) if sp.issparse(x) else values)
    else:
        csr = sp.csr_matrix(x)
        row["x_data"] = csr.data.astype(np.float32)
        row["x_indices"] = csr.indices.astype(np.int32)
        row["x_indptr"] = csr.indptr.astype(np.int64)
    row |= {"adata_obs": table_to_json(adata.obs), "adata_var": table_to_json(adata.var)}
    return row | {"n_obs": adata.n_obs, "n_vars": adata.n_vars, "x_dtype": x.dtype.name}


def from_row(row: Mapping[str, Any]) -> ad.AnnData:
    """Read a row back into an AnnData with a CSR X, checking everything.

    Takes the columns of `to_row` as lists, numpy or Arrow arrays; also (the blog's notebook form) a scipy matrix in
    `adata_sparsematrix` and DataFrames in `adata_obs` and `adata_var`. `n_obs`, `n_vars`, `x_dtype` are optional.

    Raises
    ------
    PayloadError
        Names the column and what is wrong with it.
    """
    obs = _table(row, "adata_obs", "cell")
    var = _table(row, "adata_var", "gene")
    _check_stated_shape(row, len(obs), len(var))
    if len(obs) == 0 or len(var) == 0:
        raise PayloadError(f"the row is empty: adata_obs has {len(obs)} cells, adata_var {len(var)} genes")
    matrix = _given(row, "adata_sparsematrix")
    if matrix is not None:
        extra = [name for name in _CSR if _given(row, name) is not None]
        if extra:
            raise PayloadError(f"adata_sparsematrix and {', '.join(extra)} are both given: a row has one matrix")
        x = _dense(matrix, len(obs), len(var))
        _check_values(x, var.index, "adata_sparsematrix")
    else:
        x = _csr(row, len(obs), len(var))
        _check_values(x, var.index, "x_data")
    x = _as_stated(x, _given(row, "x_dtype"))
    x.eliminate_zeros()
    return ad.AnnData(x, obs=obs, var=var)


def is_empty(row: Mapping[str, Any]) -> bool:
    """Tell whether a row carries no payload at all (a request for the whole vocabulary)."""
    return all(_given(row, name) is None for name in PAYLOAD_COLUMNS)


def arrow_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow batch with their long columns as Arrow arrays, without Python lists."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for i in range(batch.num_rows):
        yield {
            name: (column[i].values if _is_list(column.type) else column[i].as_py()) for name, column in columns.items()
        }


def table_to_json(table: pd.DataFrame) -> str:
    """Write obs or var as pandas' JSON, `orient="split"`, floats in full (pandas itself rounds to 15 digits)."""
    cells = [[_json_value(v) for v in _plain_values(column)] for _, column in table.items()]
    rows = [list(row) for row in zip(*cells, strict=True)] if cells else [[] for _ in range(len(table))]
    split = {"columns": [str(c) for c in table.columns], "index": [str(i) for i in table.index], "data": rows}
    return json.dumps(split, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def table_from_json(text: str, column: str) -> pd.DataFrame:
    """Read what `table_to_json` or pandas wrote; a PayloadError names `column`.

    Not with `pandas.read_json`: it turns names that look like numbers or dates into numbers and dates.
    """
    try:
        split = json.loads(text)
        if "\\u" in text or not text.isascii():
            json.dumps(split, ensure_ascii=False).encode()  # half a surrogate pair could be written nowhere
    except (ValueError, RecursionError) as exc:
        raise PayloadError(f"{column} is not JSON: {exc}") from exc
    if not isinstance(split, dict) or set(split) != {"columns", "index", "data"}:
        raise PayloadError(f'{column} must be pandas JSON, orient="split": an object with columns, index and data')
    columns, index, data = split["columns"], split["index"], split["data"]
    if not all(isinstance(part, list) for part in (columns, index, data)):
        raise PayloadError(f"{column}: columns, index and data must be lists")
    if not columns and not data:
        data = [[]] * len(index)  # pandas leaves the rows out where there are no columns
    if len(data) != len(index):
        raise PayloadError(f"{column}: {len(index)} names in index, {len(data)} rows in data")
    for name, values in zip(index, data, strict=True):
        if not isinstance(values, list) or len(values) != len(columns):
            raise PayloadError(f"{column}: row {name!r} of data does not have the {len(columns)} columns' values")
    if any(isinstance(name, (list, dict)) or name is None for name in (*columns, *index)):
        raise PayloadError(f"{column}: names in columns and index must be strings or numbers")
    names = [str(name) for name in columns]
    if len(set(names)) != len(names):
        raise PayloadError(f"{column}: a column name is given twice")
    try:
        table = pd.DataFrame({n: [row[j] for row in data] for j, n in enumerate(names)}, index=[str(i) for i in index])
    except (ValueError, OverflowError, TypeError) as exc:
        raise PayloadError(f"{column}: no table can be made of it: {exc}") from exc
    table.index = table.index.astype(object)
    return table


def _plain_values(column: pd.Series) -> list[Any]:
    if isinstance(column.dtype, pd.CategoricalDtype):
        return [None if missing else str(v) for v, missing in zip(column, column.isna(), strict=True)]
    return column.tolist()


def _json_value(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if _is_missing(value):
        return None
    if isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and abs(value) != float("inf"):
        return value
    return str(value)


def _is_missing(value: Any) -> bool:
    """Tell None and pandas' markers for it, as they stand in a DataFrame's cells."""
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)


def _given(row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    return None if _is_missing(value) else value


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _table(row: Mapping[str, Any], column: str, what: str) -> pd.DataFrame:
    given = _given(row, column)
    if given is None:
        raise PayloadError(f"{column} is null: the row needs its table of {what}s")
    if isinstance(given, pd.DataFrame):
        table = given.copy()
        table.index = pd.Index([str(name) for name in table.index], dtype=object)
    elif isinstance(given, str):
        shared = column == "adata_var" and len(given) <= SHARED_LENGTH
        table = _shared_genes(given).copy() if shared else table_from_json(given, column)
    else:
        raise PayloadError(f"{column} must be a JSON string, not {type(given).__name__}")
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()]
        raise PayloadError(f"{column} names {len(twice)} {what}s twice, first {twice[0]!r}")
    return table


@lru_cache(maxsize=SHARED_TABLES)
def _shared_genes(text: str) -> pd.DataFrame:
    """Read `adata_var` once for the rows that share it; a copy is for the caller, the index is one for all.

    A text that cannot be read is not kept: each row with it is told so.
    """
    table = table_from_json(text, "adata_var")
    table.index.is_unique  # noqa: B018  # builds the index's hash table before several threads look names up in it
    return table


def _check_stated_shape(row: Mapping[str, Any], n_obs: int, n_vars: int) -> None:
    for column, found, where in (("n_obs", n_obs, "adata_obs"), ("n_vars", n_vars, "adata_var")):
        stated = _given(row, column)
        if stated is None:
            continue
        if not isinstance(stated, (int, float, np.number)) or stated != found:
            raise PayloadError(f"{column} says {stated!r}, but {where} has {found} rows")


def _dense(given: Any, n_obs: int, n_vars: int) -> sp.csr_matrix:
    if sp.issparse(given):
        matrix = sp.csr_matrix(given)
        # scipy lets anyone set the arrays; they are checked as if they came in columns
        arrays = {"x_data": matrix.data, "x_indices": matrix.indices, "x_indptr": matrix.indptr}
        if matrix.shape != (n_obs, n_vars):
            raise PayloadError(f"adata_sparsematrix is {matrix.shape}, obs and var want ({n_obs}, {n_vars})")
        return _csr(arrays, n_obs, n_vars)
    cells = _numpy(given, "adata_sparsematrix") if isinstance(given, pa.Array) else given
    if not isinstance(cells, (list, tuple, np.ndarray)) or (isinstance(cells, np.ndarray) and cells.ndim == 0):
        raise PayloadError(f"adata_sparsematrix must be a list of lists, not {type(given).__name__}")
    if len(cells) != n_obs:
        raise PayloadError(f"adata_sparsematrix has {len(cells)} cells, adata_obs {n_obs}")
    checked = []
    for i, cell in enumerate(cells):
        checked.append(_numbers(cell, f"adata_sparsematrix: cell {i}"))
        if len(checked[i]) != n_vars:
            raise PayloadError(f"adata_sparsematrix: cell {i} has {len(checked[i])} values, adata_var {n_vars} genes")
    return sp.csr_matrix(np.stack(checked))


def _csr(row: Mapping[str, Any], n_obs: int, n_vars: int) -> sp.csr_matrix:
    missing = [name for name in _CSR if _given(row, name) is None]
    if missing:
        raise PayloadError(f"no matrix: {', '.join(missing)} and adata_sparsematrix are null")
    data = _numbers(row["x_data"], "x_data")
    indices = _whole_numbers(row["x_indices"], "x_indices")
    indptr = _whole_numbers(row["x_indptr"], "x_indptr").astype(np.int64)  # whose differences no number overflows
    if len(indptr) != n_obs + 1:
        raise PayloadError(f"x_indptr has {len(indptr)} entries, {n_obs} cells in adata_obs want {n_obs + 1}")
    if indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise PayloadError("x_indptr must start at 0 and never fall")
    if len(data) != len(indices):
        raise PayloadError(f"x_data has {len(data)} values, x_indices {len(indices)}")
    if indptr[-1] != len(data):
        raise PayloadError(f"x_indptr ends at {indptr[-1]}, x_data has {len(data)} values")
    if len(indices) and not (indices.min() >= 0 and indices.max() < n_vars):
        worst = indices.min() if indices.min() < 0 else indices.max()
        raise PayloadError(f"x_indices holds {worst}, adata_var has genes 0 to {n_vars - 1}")
    # copied: what Arrow lends is read-only, and sorting works in place
    matrix = sp.csr_matrix((data, indices, indptr), (n_obs, n_vars), copy=True)
    matrix.sort_indices()
    if not matrix.has_canonical_format:
        raise PayloadError("x_indices names a gene twice in one cell")
    return matrix


def _check_values(x: sp.csr_matrix, genes: pd.Index, column: str) -> None:
    for wrong, what in ((~np.isfinite(x.data), "NaN or infinity"), (x.data < 0, "a negative value")):
        if wrong.any():
            at = int(np.argmax(wrong))
            cell = int(np.searchsorted(x.indptr, at, side="right")) - 1
            raise PayloadError(f"{column} holds {what} in cell {cell}, gene {genes[x.indices[at]]!r}")


def _numbers(values: Any, column: str) -> np.ndarray:
    """Read a flat list of numbers: float32 and float64 stay, others become float64."""
    array = _numpy(values, column)
    if array.ndim != 1:
        raise PayloadError(f"{column} must be a flat list of numbers")
    if array.dtype == object:
        array = _objects_as_numbers(array, column)
    if array.dtype.kind not in "iuf":
        raise PayloadError(f"{column} holds what is no number ({array.dtype})")
    return array if array.dtype in (np.float32, np.float64) else _cast(array, np.float64)


def _objects_as_numbers(array: np.ndarray, column: str) -> np.ndarray:
    nulls = sum(map(_is_missing, array))
    if nulls:
        raise PayloadError(f"{column} holds {nulls} nulls")
    for value in array:
        if not isinstance(value, (int, float, np.integer, np.floating, Decimal)) or isinstance(value, bool):
            raise PayloadError(f"{column} holds what is no number: {type(value).__name__}")
    try:
        return array.astype(np.float64)
    except (ValueError, TypeError, OverflowError) as exc:
        raise PayloadError(f"{column} holds what is no number: {exc}") from exc


def _whole_numbers(values: Any, column: str) -> np.ndarray:
    """Read a flat list of whole numbers: int32 stay, which scipy's matrices hold; others become int64."""
    array = _numpy(values, column)
    if array.ndim == 1 and array.dtype.kind in "iu" and array.dtype != np.uint64:
        return array if array.dtype == np.int32 else array.astype(np.int64, copy=False)
    floats = _numbers(array, column)
    if not (np.isfinite(floats).all() and (floats == np.floor(floats)).all() and (abs(floats) < 2**53).all()):
        raise PayloadError(f"{column} holds NaN, fractions or huge numbers where indices are due")
    return floats.astype(np.int64)


def _numpy(values: Any, column: str) -> np.ndarray:
    if isinstance(values, pa.Array):
        if values.null_count:
            raise PayloadError(f"{column} holds {values.null_count} nulls")
        if _is_list(values.type):
            return np.array([*(_numpy(cell.values, column) for cell in values), None], dtype=object)[:-1]
        return values.to_numpy(zero_copy_only=False)
    try:
        return np.asarray(values)
    except (ValueError, TypeError) as exc:
        raise PayloadError(f"{column} is ragged: {exc}") from exc


def _as_stated(x: sp.csr_matrix, name: Any) -> sp.csr_matrix:
    """Cast to `x_dtype`. Rounding to a shorter float is allowed; any other change of a value is not."""
    if name is None:
        return x
    dtype = _number_type(name, "x_dtype")
    data = _cast(x.data, dtype)
    lost = ~np.isfinite(data) if dtype.kind == "f" else data != x.data
    if lost.any():
        raise PayloadError(f"x_dtype says {name}, which does not hold {x.data[np.argmax(lost)]}")
    return sp.csr_matrix((data, x.indices, x.indptr), x.shape)


def _number_type(name: Any, what: str) -> np.dtype:
    if not isinstance(name, str) or name not in _NUMBER_TYPES:
        raise PayloadError(f"{what} is {name!r}, none of {', '.join(_NUMBER_TYPES)}")
    return np.dtype(name)


def _cast(values: np.ndarray, dtype: Any) -> np.ndarray:
    with np.errstate(all="ignore"):  # the caller looks whether a value was lost
        return values.astype(dtype)

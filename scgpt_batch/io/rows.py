"""Conversion between an AnnData and one table row: the only module that knows how a row is serialized.

A row contains the matrix as `adata_sparsematrix` (dense, cells × genes) or as `x_data`, `x_indices`, `x_indptr` (CSR),
and obs and var as JSON (`orient="split"`). Every row is validated when it is read. The rules for values and names are
defined here and apply to all inputs; docs/ingest.md lists them in a table.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from scgpt_batch.errors import PayloadError, listed, shortened

MATRIX_COLUMNS = ("adata_sparsematrix", "x_data", "x_indices", "x_indptr")
PAYLOAD_COLUMNS = (*MATRIX_COLUMNS, "adata_obs", "adata_var")
# All rows of a file or sample repeat the same gene table, so the last tables are cached. A character of JSON takes 7
# bytes (33,000 genes and two columns of a 10x file: 9 MB) to 15 bytes (short texts only), so the cache takes at most
# 500 MB.
SHARED_TABLES = 4  # number of cached tables
SHARED_LENGTH = 8_000_000  # maximum length of the JSON of a cached table, in characters
MAX_TABLE_COLUMNS = 10_000  # columns of obs or var; with more, pandas takes seconds and gigabytes
# Maximum length in characters. Names, labels and keys (a path and labels) are written beside each embedding.
MAX_NAME, MAX_KEY = 1_000, 8_000
_CSR = ("x_data", "x_indices", "x_indptr")
FLOAT32_MAX = float(np.finfo(np.float32).max)
_NUMBER_TYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
)  # fmt: skip
MISSING_LABEL = "(missing)"  # group or batch of cells without a label


@dataclass(frozen=True)
class RowContent:
    """The validated content of a row.

    Attributes
    ----------
    x
        Cells × genes, in the type that `x_dtype` states, without stored zeros. No value is negative, NaN or outside the
        range of float32.
    obs
        Table of cells, with unique names.
    var
        Table of genes. Names may repeat; "" means that a gene has no name. Shared between rows: do not modify.
    warnings
        Changes made while reading.
    """

    x: sp.csr_matrix
    obs: pd.DataFrame
    var: pd.DataFrame
    warnings: tuple[str, ...] = ()


def to_row(
    adata: ad.AnnData,
    *,
    layer: str | None = None,
    layout: Literal["csr", "dense"] = "csr",
    warnings: list[str] | None = None,
) -> dict[str, Any]:
    """Return the payload columns of a row for an AnnData.

    `from_row` restores values, names and the type of X, with these exceptions (docs/ingest.md): values that float32
    cannot represent are rounded, and repeated cell names get a suffix. In obs and var, categoricals become strings,
    integers int64, floats float64, missing values NaN or None, and everything else (dates, infinities) a string.

    Parameters
    ----------
    adata
        Cells × genes; X dense or sparse, of any real number type.
    layer
        Layer to use instead of X.
    layout
        "csr" stores X as float32, "dense" as float64 with all zeros. The model computes in float32 in either case.
    warnings
        List to which a message is appended for each change to the data.

    Raises
    ------
    PayloadError
        X (or the layer) is missing, is not numeric, or contains negative values, NaN, infinity or values outside the
        range of float32.

    Examples
    --------
    >>> adata = anndata.AnnData(np.array([[0, 2], [1, 0]], "float32"))
    >>> adata.var_names = ["CD3D", "LYZ"]
    >>> row = to_row(adata)
    >>> row["x_data"], row["x_indices"], row["x_indptr"]
    (array([2., 1.], dtype=float32), array([1, 0], dtype=int32), array([0, 1, 2]))
    """
    messages = [] if warnings is None else warnings
    what = "X" if layer is None else f"layer {layer!r}"
    x = adata.X if layer is None else adata.layers.get(layer)
    if x is None:
        raise PayloadError(f"the AnnData has no {what}; its layers: {listed(layer_names(adata), layer or '')}")
    if x.dtype.kind not in "biuf":
        raise PayloadError(f"{what} has type {x.dtype}; convert it to real numbers, e.g. with .astype('float32')")
    csr = _canonical_csr(x)
    check_values(csr, adata.var_names, what)
    obs_names, cell_warning = unique_cell_names(adata.obs_names)
    row: dict[str, Any] = dict.fromkeys(PAYLOAD_COLUMNS)
    if layout == "dense":
        values = _cast(csr.data, np.float64)
        dense = np.zeros(csr.shape)
        dense[np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr)), csr.indices] = values
        row["adata_sparsematrix"] = list(dense)
    else:
        values = _cast(csr.data, np.float32)
        row["x_data"] = values
        row["x_indices"] = csr.indices.astype(np.int32)
        row["x_indptr"] = csr.indptr.astype(np.int64)
    rounded = rounding_warning(csr, values, adata.var_names)
    messages += filter(None, (cell_warning, rounded, log_base_warning(adata.uns)))
    obs = adata.obs if obs_names is adata.obs_names else adata.obs.set_index(obs_names)
    row |= {"adata_obs": table_to_json(obs), "adata_var": table_to_json(adata.var)}
    return row | {"n_obs": adata.n_obs, "n_vars": adata.n_vars, "x_dtype": _stated_type(x.dtype, csr.data, values)}


def from_row(row: Mapping[str, Any]) -> ad.AnnData:
    """Return the AnnData of a row, with X in CSR format.

    Parameters
    ----------
    row
        The columns of `to_row` as lists, numpy arrays or Arrow arrays; `n_obs`, `n_vars` and `x_dtype` are optional. A
        scipy matrix in `adata_sparsematrix`, and DataFrames in `adata_obs` and `adata_var`, are accepted too.

    Raises
    ------
    PayloadError
        The row is invalid; the message names the column.

    Examples
    --------
    >>> from_row(to_row(adata)).to_df().equals(adata.to_df())
    True
    """
    content = read_row(row)
    adata = ad.AnnData(content.x, obs=content.obs)
    adata.var = content.var.copy()
    return adata


def read_row(row: Mapping[str, Any]) -> RowContent:
    """Return the validated content of a row, with warnings. Faster than `from_row`, which creates an AnnData."""
    for key in ("adata_id", "sample_id"):
        _check_length([row.get(key)], key, "key", MAX_KEY)
    obs, warning = _cells(row)
    var = _genes(row)
    _check_stated_shape(row, len(obs), len(var))
    if len(obs) == 0 or len(var) == 0:
        raise PayloadError(
            f"the row is empty: adata_obs has {len(obs)} cells and adata_var {len(var)} genes; leave such rows out"
        )
    matrix = _given(row, "adata_sparsematrix")
    if matrix is not None:
        extra = [name for name in _CSR if _given(row, name) is not None]
        if extra:
            raise PayloadError(f"adata_sparsematrix and {', '.join(extra)} are both given; set one of them to null")
        x = _dense(matrix, len(obs), len(var))
        check_values(x, var.index, "adata_sparsematrix")
    else:
        x = _csr(row, len(obs), len(var))
        check_values(x, var.index, "x_data")
    stated = _given(row, "x_dtype")
    if stated is None and sp.issparse(matrix) and matrix.dtype.name in _NUMBER_TYPES:
        stated = matrix.dtype.name
    x = _as_stated(x, stated)
    x.eliminate_zeros()
    return RowContent(x, obs, var, (warning,) if warning else ())


def check_values(x: sp.csr_matrix, genes: pd.Index, column: str) -> None:
    """Check that values can be counts or logarithms of counts.

    Parameters
    ----------
    x
        Cells × genes.
    genes
        Names of the genes, for the message.
    column
        Column or matrix that contains the values, for the message.

    Raises
    ------
    PayloadError
        A value is negative, NaN, infinite or outside the range of float32; the message names the first cell and gene.
    """
    data = x.data
    if not len(data) or (data.dtype.kind in "bu"):
        return
    with np.errstate(invalid="ignore"):
        least, largest = data.min(), data.max()  # NaN if any value is NaN
        if least >= 0 and largest <= FLOAT32_MAX:
            return
        checks = (
            (~np.isfinite(data), "NaN or infinity", "replace missing values by zeros, or leave those cells out"),
            (data < 0, "negative values", "X looks scaled; use raw counts instead, e.g. --layer counts or --layer raw"),
            (data > FLOAT32_MAX, "values outside the range of float32 (3.4e38)", "rescale X"),
        )
    invalid, what, advice = next(check for check in checks if check[0].any())
    cell, gene = _place(x, int(np.argmax(invalid)))
    raise PayloadError(f"{column} contains {what} (first: cell {cell}, gene {genes[gene]!r}); {advice}")


def as_float32(x: sp.csr_matrix, genes: pd.Index) -> tuple[sp.csr_matrix, str | None]:
    """Return a matrix in float32, as the model reads it, and a warning if whole numbers were rounded."""
    if x.dtype == np.float32:
        return x, None
    values = _cast(x.data, np.float32)
    warning = rounding_warning(x, values, genes)
    x = sp.csr_matrix((values, x.indices, x.indptr), x.shape)
    x.eliminate_zeros()  # float32 rounds values below 1e-45 to zero
    return x, warning


def rounding_warning(x: sp.csr_matrix, values: np.ndarray, genes: pd.Index) -> str | None:
    """Return a warning if `values`, the values of x in another type, contain rounded whole numbers above 2^24."""
    if x.dtype.kind not in "iuf" or x.dtype.itemsize < 4 or x.dtype == values.dtype or not len(values):
        return None
    if values.max() < 2**24:
        return None
    changed = (values >= 2**24) & ~_unchanged(values, x.data)
    if x.dtype.kind == "f":
        changed &= x.data == np.floor(x.data)
    if not changed.any():
        return None
    cell, gene = _place(x, int(np.argmax(changed)))
    return (
        f"{int(changed.sum())} whole numbers above 2^24 are rounded to {values.dtype.name} "
        f"(first: cell {cell}, gene {genes[gene]!r})"
    )


def unique_cell_names(names: pd.Index) -> tuple[pd.Index, str | None]:
    """Return unique cell names, and a warning if names were repeated.

    From its second occurrence on, a name gets the suffix -1, -2, …, as in `AnnData.obs_names_make_unique`. Unique names
    are returned as the same object. Call this with all cells of a file or request, before they are divided into rows.

    >>> unique_cell_names(pd.Index(["AAAC", "AAAG", "AAAC"]))[0].tolist()
    ['AAAC', 'AAAG', 'AAAC-1']
    """
    if names.is_unique:
        return names, None
    taken, last_suffix = set(names), dict[str, int]()
    unique = names.to_numpy(dtype=object, copy=True)
    repeated = names.duplicated()
    for i in np.flatnonzero(repeated):
        name = unique[i]
        while (new := f"{name}-{last_suffix.setdefault(name, 0) + 1}") in taken:
            last_suffix[name] += 1
        last_suffix[name] += 1
        taken.add(new)
        unique[i] = new
    first = names[repeated][0]
    return pd.Index(unique, dtype=object), f"{int(repeated.sum())} repeated cell names got a suffix (first: {first!r})"


def string_labels(column: pd.Series) -> np.ndarray:
    """Return labels of any type as strings, and "(missing)" for null; object array of shape (cells,).

    Whole numbers have no ".0". pandas converts whole numbers to floats if a row also contains a null, and the label of
    a cell must not depend on other cells.

    Raises
    ------
    PayloadError
        A label is longer than `MAX_NAME`.
    """
    codes, values = pd.factorize(column)
    labels = [str(int(v)) if isinstance(v, (float, np.floating)) and v.is_integer() else str(v) for v in values]
    _check_length(labels, f"column {column.name!r}", "label")
    return np.array([*labels, MISSING_LABEL], dtype=object)[codes]  # a null has code -1


def missing_warning(labels: np.ndarray, column: str) -> str | None:
    """Return a warning if some cells have no label in `column`; `labels` are those of `string_labels`."""
    missing = int((labels == MISSING_LABEL).sum())
    return f"{missing} cells have no {column!r}: they form the group {MISSING_LABEL}" if missing else None


def log_base_warning(uns: Mapping[str, Any]) -> str | None:
    """Return a warning if `uns` states another base of the logarithm than e, which scGPT was trained with."""
    stated = uns.get("log1p")
    base = stated.get("base") if isinstance(stated, Mapping) else None
    if base is None or np.isclose(float(base), np.e):
        return None
    return f"uns['log1p'] states logarithms to base {float(base):g}; scGPT expects natural logarithms"


def is_empty(row: Mapping[str, Any]) -> bool:
    """Return whether a row has no payload, as in a request for the whole vocabulary."""
    return all(_given(row, name) is None for name in PAYLOAD_COLUMNS)


def arrow_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow batch as dicts. Lists stay Arrow arrays, which avoids slow Python lists."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for i in range(batch.num_rows):
        yield {
            name: (column[i].values if _is_list(column.type) else column[i].as_py()) for name, column in columns.items()
        }


def table_to_json(table: pd.DataFrame) -> str:
    """Return obs or var as pandas JSON, `orient="split"`, with exact floats (pandas rounds to 15 digits)."""
    cells = [[_json_value(v) for v in _plain_values(column)] for _, column in table.items()]
    rows = [list(row) for row in zip(*cells, strict=True)] if cells else [[] for _ in range(len(table))]
    split = {"columns": [str(c) for c in table.columns], "index": _names(table.index), "data": rows}
    return json.dumps(split, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def layer_names(adata: ad.AnnData) -> list[str]:
    """Return the names of the layers. anndata 0.13 also lists X as a layer, with the name None; it is left out."""
    return [name for name in adata.layers if name is not None]


def table_from_json(text: str, column: str) -> pd.DataFrame:
    """Return obs or var from pandas JSON, `orient="split"`.

    `pandas.read_json` is not used, because it converts names that look like numbers or dates.

    Parameters
    ----------
    text
        JSON written by `table_to_json` or pandas.
    column
        Column that contains it, for messages.

    Raises
    ------
    PayloadError
        The text is not such JSON; the message names `column`.
    """
    _require_text(text, column)
    try:
        split = json.loads(text)
        if "\\u" in text or not text.isascii():
            json.dumps(split, ensure_ascii=False).encode()  # fails for unpaired surrogates, which cannot be stored
    except (ValueError, RecursionError) as exc:
        raise PayloadError(f"{column} is not JSON: {exc}") from exc
    if not isinstance(split, dict) or set(split) != {"columns", "index", "data"}:
        raise PayloadError(f'{column} must be pandas JSON, orient="split": an object with columns, index and data')
    columns, index, data = split["columns"], split["index"], split["data"]
    if not all(isinstance(part, list) for part in (columns, index, data)):
        raise PayloadError(f"{column}: columns, index and data must be lists")
    if not columns and not data:
        data = [[]] * len(index)  # pandas omits the rows of a table without columns
    names = _checked_names(columns, index, data, column)
    try:
        table = pd.DataFrame(
            {name: _column([row[j] for row in data]) for j, name in enumerate(names)}, index=range(len(index))
        )
    except (ValueError, OverflowError, TypeError) as exc:
        raise PayloadError(f"{column} cannot be read as a table: {exc}") from exc
    table.index = pd.Index(_names(index), dtype=object)
    return table


def _checked_names(columns: list[Any], index: list[Any], data: list[Any], column: str) -> list[str]:
    """Check that the three parts of the JSON match each other, and return the names of the columns."""
    if len(columns) > MAX_TABLE_COLUMNS:
        raise PayloadError(f"{column} has {len(columns):,} columns; the limit is {MAX_TABLE_COLUMNS:,}: drop some")
    if len(data) != len(index):
        raise PayloadError(f"{column}: index has {len(index)} names, but data has {len(data)} rows")
    for name, values in zip(index, data, strict=True):
        if not isinstance(values, list) or len(values) != len(columns):
            raise PayloadError(f"{column}: row {name!r} of data must be a list of {len(columns)} values, one a column")
    if any(isinstance(name, (list, dict)) for name in (*columns, *index)) or any(map(_is_missing, columns)):
        raise PayloadError(f"{column}: names in columns and index must be strings or numbers")
    _check_length((*columns, *index), column, "name")
    names = [str(name) for name in columns]
    if len(set(names)) != len(names):
        raise PayloadError(f"{column}: a column name is repeated; rename or drop one of the columns")
    return names


def _check_length(texts: Iterable[Any], where: str, what: str, limit: int = MAX_NAME) -> None:
    """Check that no string has more than `limit` characters."""
    for text in texts:
        if isinstance(text, str) and len(text) > limit:
            raise PayloadError(
                f"{where} contains a {what} of {len(text):,} characters ({shortened(text)!r}); the limit is "
                f"{limit:,}: use a shorter {what}"
            )


def _names(index: Iterable[Any]) -> list[str | None]:
    return [None if _is_missing(name) else str(name) for name in index]


def _column(values: list[Any]) -> Any:
    """Return strings as an object column; pandas 3 would infer its string type, which changes None."""
    return pd.Series(values, dtype=object) if any(isinstance(value, str) for value in values) else values


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
    """Return whether a value is None or a missing-value marker of pandas."""
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)


def _given(row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    return None if _is_missing(value) else value


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _canonical_csr(x: Any) -> sp.csr_matrix:
    """Return X as canonical CSR in the machine's byte order, with duplicate entries summed. X is not modified."""
    wanted = np.dtype(np.float32) if x.dtype == np.float16 else x.dtype.newbyteorder("=")  # scipy has no float16
    csr = sp.csr_matrix(x if x.dtype == wanted and x.dtype.isnative else x.astype(wanted))
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    return csr


def _cells(row: Mapping[str, Any]) -> tuple[pd.DataFrame, str | None]:
    """Return obs with unique names, and a warning if names were repeated."""
    given = _given(row, "adata_obs")
    obs = given if isinstance(given, pd.DataFrame) else table_from_json(_text(given, "adata_obs", "cell"), "adata_obs")
    names = pd.Index(_names(obs.index), dtype=object)
    if names.hasnans:
        raise PayloadError(f"adata_obs: {int(names.isna().sum())} cells have no name; give each cell a name")
    names, warning = unique_cell_names(names)
    return obs.set_axis(names), warning


def _genes(row: Mapping[str, Any]) -> pd.DataFrame:
    """Return var, shared between rows with the same JSON. The name of a gene without one is ""."""
    given = _given(row, "adata_var")
    if isinstance(given, pd.DataFrame):
        return given.set_axis(pd.Index([name or "" for name in _names(given.index)], dtype=object))
    return genes_from_json(_text(given, "adata_var", "gene"))


def _text(given: Any, column: str, what: str) -> str:
    if given is None:
        raise PayloadError(f"{column} is null; every row needs its table of {what}s")
    _require_text(given, column)
    return given


def _require_text(given: Any, column: str) -> None:
    if not isinstance(given, str):
        raise PayloadError(f"{column} must be a JSON string, not {type(given).__name__}")


@lru_cache(maxsize=SHARED_TABLES)
def _shared_genes(text: str) -> pd.DataFrame:
    """Return a gene table from the cache. Errors are not cached, so each row gets its own."""
    return _genes_from_json(text)


def genes_from_json(text: str) -> pd.DataFrame:
    """Return the gene table of `adata_var`, cached unless it is very long. Do not modify it: rows share it."""
    _require_text(text, "adata_var")
    return _shared_genes(text) if len(text) <= SHARED_LENGTH else _genes_from_json(text)


def _genes_from_json(text: str) -> pd.DataFrame:
    var = table_from_json(text, "adata_var")
    return var.set_axis(var.index.fillna("")) if var.index.hasnans else var


def _check_stated_shape(row: Mapping[str, Any], n_obs: int, n_vars: int) -> None:
    for column, found, where in (("n_obs", n_obs, "adata_obs"), ("n_vars", n_vars, "adata_var")):
        stated = _given(row, column)
        if stated is None:
            continue
        if not isinstance(stated, (int, float, np.number)) or stated != found:
            raise PayloadError(f"{column} is {stated!r}, but {where} has {found} rows; correct one of them")


def _dense(given: Any, n_obs: int, n_vars: int) -> sp.csr_matrix:
    if sp.issparse(given):
        matrix = sp.csr_matrix(given)
        # scipy does not check arrays that are set directly, so they are checked like arrays in columns
        data = matrix.data.view(np.uint8) if matrix.dtype == bool else matrix.data
        arrays = {"x_data": data, "x_indices": matrix.indices, "x_indptr": matrix.indptr}
        if matrix.shape != (n_obs, n_vars):
            raise PayloadError(
                f"adata_sparsematrix has the shape {matrix.shape}, but adata_obs has {n_obs} cells and adata_var "
                f"{n_vars} genes"
            )
        return _csr(arrays, n_obs, n_vars)
    cells = _numpy(given, "adata_sparsematrix") if isinstance(given, pa.Array) else given
    if not isinstance(cells, (list, tuple, np.ndarray)) or (isinstance(cells, np.ndarray) and cells.ndim == 0):
        raise PayloadError(f"adata_sparsematrix must be a list of lists, not {type(given).__name__}")
    if len(cells) != n_obs:
        raise PayloadError(f"adata_sparsematrix has {len(cells)} cells, but adata_obs has {n_obs}")
    checked = []
    for i, cell in enumerate(cells):
        checked.append(_numbers(cell, f"adata_sparsematrix: cell {i}"))
        if len(checked[i]) != n_vars:
            raise PayloadError(
                f"adata_sparsematrix: cell {i} has {len(checked[i])} values, but adata_var has {n_vars} genes"
            )
    return sp.csr_matrix(np.stack(checked))


def _csr(row: Mapping[str, Any], n_obs: int, n_vars: int) -> sp.csr_matrix:
    missing = [name for name in _CSR if _given(row, name) is None]
    if missing:
        raise PayloadError(f"the row has no matrix: {', '.join(missing)} and adata_sparsematrix are null")
    data = _numbers(row["x_data"], "x_data")
    indices = _whole_numbers(row["x_indices"], "x_indices")
    indptr = _whole_numbers(row["x_indptr"], "x_indptr").astype(np.int64)
    _check_csr(data, indices, indptr, n_obs, n_vars)
    # copied, because Arrow arrays are read-only and sort_indices works in place
    matrix = sp.csr_matrix((data, indices, indptr), (n_obs, n_vars), copy=True)
    matrix.sort_indices()
    if not matrix.has_canonical_format:
        raise PayloadError("x_indices contains the same gene twice in one cell; sum such entries")
    return matrix


def _check_csr(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, n_obs: int, n_vars: int) -> None:
    if len(indptr) != n_obs + 1:
        raise PayloadError(f"x_indptr has {len(indptr)} entries, but {n_obs} cells in adata_obs need {n_obs + 1}")
    if indptr[0] != 0 or (indptr[1:] < indptr[:-1]).any():  # differences could overflow
        raise PayloadError("x_indptr must start at 0 and never decrease")
    if len(data) != len(indices):
        raise PayloadError(f"x_data has {len(data)} values, but x_indices has {len(indices)}")
    if indptr[-1] != len(data):
        raise PayloadError(f"x_indptr ends at {indptr[-1]}, but x_data has {len(data)} values")
    if len(indices) and not (indices.min() >= 0 and indices.max() < n_vars):
        worst = indices.min() if indices.min() < 0 else indices.max()
        raise PayloadError(f"x_indices contains {worst}, but the genes of adata_var are 0 to {n_vars - 1}")


def _place(x: sp.csr_matrix, entry: int) -> tuple[int, int]:
    """Return the cell and the gene of a stored entry."""
    return int(np.searchsorted(x.indptr, entry, side="right")) - 1, int(x.indices[entry])


def _numbers(values: Any, column: str) -> np.ndarray:
    """Return a flat list of numbers as an array: float32 and float64 unchanged, other types as float64."""
    array = _numpy(values, column)
    if array.ndim != 1:
        raise PayloadError(f"{column} must be a flat list of numbers")
    if array.dtype == object:
        array = _objects_as_numbers(array, column)
    if array.dtype.kind not in "iuf":
        raise PayloadError(f"{column} must contain numbers, not values of type {array.dtype}")
    return array if array.dtype in (np.float32, np.float64) else _cast(array, np.float64)


def _objects_as_numbers(array: np.ndarray, column: str) -> np.ndarray:
    nulls = sum(map(_is_missing, array))
    if nulls:
        raise PayloadError(f"{column} contains {nulls} nulls; replace them by zeros")
    for value in array:
        if not isinstance(value, (int, float, np.integer, np.floating, Decimal)) or isinstance(value, bool):
            raise PayloadError(f"{column} must contain numbers, not values of type {type(value).__name__}")
    try:
        return array.astype(np.float64)
    except (ValueError, TypeError, OverflowError) as exc:
        raise PayloadError(f"{column} must contain numbers: {exc}") from exc


def _whole_numbers(values: Any, column: str) -> np.ndarray:
    """Return a flat list of whole numbers as an array: int32 unchanged, as scipy uses it; other types as int64."""
    array = _numpy(values, column)
    if array.ndim == 1 and array.dtype.kind in "iu" and array.dtype != np.uint64:
        return array if array.dtype == np.int32 else array.astype(np.int64, copy=False)
    floats = _numbers(array, column)
    if not (np.isfinite(floats).all() and (floats == np.floor(floats)).all() and (abs(floats) < 2**53).all()):
        raise PayloadError(f"{column} must contain whole numbers below 2^53, not NaN, fractions or larger numbers")
    return floats.astype(np.int64)


def _numpy(values: Any, column: str) -> np.ndarray:
    if isinstance(values, pa.Array):
        if values.null_count:
            raise PayloadError(f"{column} contains {values.null_count} nulls; replace them by zeros")
        if _is_list(values.type):
            return np.array([*(_numpy(cell.values, column) for cell in values), None], dtype=object)[:-1]
        return values.to_numpy(zero_copy_only=False)
    try:
        return np.asarray(values)
    except (ValueError, TypeError) as exc:
        raise PayloadError(f"{column} contains lists of different lengths: {exc}") from exc


def _as_stated(x: sp.csr_matrix, name: Any) -> sp.csr_matrix:
    """Return the matrix in the type `x_dtype`, which may round floats, but not change values in any other way."""
    if name is None:
        return x
    dtype = np.dtype(np.float32) if name == "float16" else _number_type(name)  # scipy has no float16
    data = _cast(x.data, dtype)
    lost = ~np.isfinite(data) if dtype.kind == "f" else ~_unchanged(data, x.data)
    if lost.any():
        raise PayloadError(f"x_dtype is {name}, which cannot represent the value {x.data[np.argmax(lost)]}")
    return sp.csr_matrix((data, x.indices, x.indptr), x.shape)


def _stated_type(dtype: np.dtype, original: np.ndarray, values: np.ndarray) -> str:
    """Return the `x_dtype` of a row: the type of X if `values`, X in another type, can be converted back to it.

    An integer type is also kept if its values were rounded, because preprocessing treats whole numbers as counts.
    """
    if dtype.kind in "biu":
        convertible = _unchanged(_cast(values, dtype), values)
        return dtype.name if convertible.all() else values.dtype.name
    same = dtype.name in _NUMBER_TYPES and bool(_unchanged(values, original).all())
    return dtype.name if same else values.dtype.name


def _unchanged(cast: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Return which values did not change when they were cast to another number type."""
    same = _cast(cast, original.dtype) == original
    for whole, other in ((cast, original), (original, cast)):
        if whole.dtype.kind in "iu" and other.dtype.kind == "f":
            # the cast of a float outside the integer range is undefined, and may even return the original
            same &= other < 2.0 ** (8 * whole.dtype.itemsize - (whole.dtype.kind == "i"))
    return same


def _number_type(name: Any) -> np.dtype:
    if not isinstance(name, str) or name not in _NUMBER_TYPES:
        raise PayloadError(f"x_dtype is {shortened(str(name))!r}, but must be one of {', '.join(_NUMBER_TYPES)}")
    return np.dtype(name)


def _cast(values: np.ndarray, dtype: Any) -> np.ndarray:
    with np.errstate(all="ignore"):  # callers check for values that changed
        return values.astype(dtype)

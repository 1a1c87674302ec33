"""AnnData <-> one row of columns: the only module that knows how a row spells a matrix and its tables.

A row holds either `adata_sparsematrix` (dense, cells × genes) or `x_data`, `x_indices`, `x_indptr` (CSR), with `obs`
and `var` as JSON, `orient="split"`. All that arrives is checked before it is used. The rules for values and names are
here, so that every way into the package follows them; docs/ingest.md has them as a table.
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

from scgpt_batch.errors import PayloadError, shortened

MATRIX_COLUMNS = ("adata_sparsematrix", "x_data", "x_indices", "x_indptr")
PAYLOAD_COLUMNS = (*MATRIX_COLUMNS, "adata_obs", "adata_var")
# The genes of a file or sample come with each of its rows; so many of these tables are kept, of JSON up to so many
# characters. A character takes 7 bytes (a 10x file's 33,000 genes and two columns: 9 MB) to 15 (short texts alone):
# 500 MB at most.
SHARED_TABLES, SHARED_LENGTH = 4, 8_000_000
MAX_TABLE_COLUMNS = 10_000  # of obs or var: a table of more takes pandas seconds and gigabytes
# Characters of a name or label, and of a row's keys (a path and labels): they stand beside each embedding.
MAX_NAME, MAX_KEY = 1_000, 8_000
_CSR = ("x_data", "x_indices", "x_indptr")
FLOAT32_MAX = float(np.finfo(np.float32).max)
_NUMBER_TYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
)  # fmt: skip
MISSING_LABEL = "(missing)"  # group or batch of the cells without one


@dataclass(frozen=True)
class RowContent:
    """What a row holds, checked.

    Attributes
    ----------
    x
        Cells × genes, of the type that the row states, without stored zeros; no value is negative, NaN or beyond
        float32's range.
    obs
        The cells' table; names are unique.
    var
        The genes' table as the row has it: names may repeat, "" is a gene without a name. Shared by rows: read only.
    warnings
        What was changed on the way.
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
    """Turn X (or a layer), obs and var of an AnnData into the payload columns of a row.

    `from_row` gives values, names and the type of X back, except where the rules for values and names (docs/ingest.md)
    change them: values that float32 cannot hold are rounded, repeated cell names get a suffix. In obs and var,
    categoricals come back as strings, integers as int64, floats as float64 and missing values as NaN or None; anything
    else (dates, infinities) as its string.

    Parameters
    ----------
    adata
        Cells × genes; X dense or sparse, of any real number type.
    layer
        The layer to take instead of X.
    layout
        "csr" stores X as float32; "dense" as float64, every zero included. The model computes in float32 either way.
    warnings
        A list to which a sentence is appended for each change that the caller should know of.

    Raises
    ------
    PayloadError
        There is no X (or no such layer), or it contains negative values, NaN, infinity, values beyond float32's range
        or no numbers.
    """
    told = [] if warnings is None else warnings
    what = "X" if layer is None else f"layer {layer!r}"
    x = adata.X if layer is None else adata.layers.get(layer)
    if x is None:
        held = ", ".join(map(repr, layer_names(adata))) or "none"
        raise PayloadError(f"the AnnData has no {what}; its layers: {held}")
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
    told += filter(None, (cell_warning, rounding_warning(csr, values, adata.var_names), log_base_warning(adata.uns)))
    obs = adata.obs if obs_names is adata.obs_names else adata.obs.set_index(obs_names)
    row |= {"adata_obs": table_to_json(obs), "adata_var": table_to_json(adata.var)}
    return row | {"n_obs": adata.n_obs, "n_vars": adata.n_vars, "x_dtype": _stated_type(x.dtype, csr.data, values)}


def from_row(row: Mapping[str, Any]) -> ad.AnnData:
    """Read a row back into an AnnData with a CSR X, checking everything.

    Takes the columns of `to_row` as lists, numpy or Arrow arrays; also (the blog's notebook form) a scipy matrix in
    `adata_sparsematrix` and DataFrames in `adata_obs` and `adata_var`. `n_obs`, `n_vars`, `x_dtype` are optional.
    Genes stay as the row has them, repeated names too.

    Raises
    ------
    PayloadError
        Names the column and what is wrong with it.
    """
    content = read_row(row)
    adata = ad.AnnData(content.x, obs=content.obs)
    adata.var = content.var.copy()
    return adata


def read_row(row: Mapping[str, Any]) -> RowContent:
    """Read a row as `from_row` does, with the warnings, and without the cost of an AnnData."""
    for key in ("adata_id", "sample_id"):
        _refuse_long([row.get(key)], key, "key", MAX_KEY)
    obs, warning = _cells(row)
    var = _genes(row)
    _check_stated_shape(row, len(obs), len(var))
    if len(obs) == 0 or len(var) == 0:
        raise PayloadError(f"the row is empty: adata_obs has {len(obs)} cells, adata_var {len(var)} genes")
    matrix = _given(row, "adata_sparsematrix")
    if matrix is not None:
        extra = [name for name in _CSR if _given(row, name) is not None]
        if extra:
            raise PayloadError(f"adata_sparsematrix and {', '.join(extra)} are both given: a row has one matrix")
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
    """Reject values that cannot be counts or their logarithms: a PayloadError names the first cell and gene.

    Parameters
    ----------
    x
        Cells × genes.
    column
        Where the values come from, for the message.
    """
    data = x.data
    if not len(data) or (data.dtype.kind in "bu"):
        return
    with np.errstate(invalid="ignore"):
        least, largest = data.min(), data.max()  # NaN where one is
        if least >= 0 and largest <= FLOAT32_MAX:
            return
        wrongs = (
            (~np.isfinite(data), "NaN or infinity", "replace missing values by zeros, or leave those cells out"),
            (data < 0, "negative values", "X looks scaled; use raw counts instead, e.g. --layer counts or --layer raw"),
            (data > FLOAT32_MAX, "values beyond float32's range (3.4e38)", "the model computes in float32: rescale X"),
        )
    wrong, what, advice = next(entry for entry in wrongs if entry[0].any())
    cell, gene = _place(x, int(np.argmax(wrong)))
    raise PayloadError(f"{column} contains {what} (first: cell {cell}, gene {genes[gene]!r}); {advice}")


def as_float32(x: sp.csr_matrix, genes: pd.Index) -> tuple[sp.csr_matrix, str | None]:
    """Return checked values as the model sees them, in float32, and a warning where whole numbers were rounded."""
    if x.dtype == np.float32:
        return x, None
    values = _cast(x.data, np.float32)
    warning = rounding_warning(x, values, genes)
    x = sp.csr_matrix((values, x.indices, x.indptr), x.shape)
    x.eliminate_zeros()  # what float32 rounds to zero
    return x, warning


def rounding_warning(x: sp.csr_matrix, values: np.ndarray, genes: pd.Index) -> str | None:
    """Say how many whole numbers above 2^24 `values`, the cast of x's, do not hold exactly."""
    if x.dtype.kind not in "iuf" or x.dtype.itemsize < 4 or x.dtype == values.dtype or not len(values):
        return None
    if values.max() < 2**24:
        return None
    changed = (values >= 2**24) & ~_holds(values, x.data)
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
    """Give repeated cell names -1, -2, … from the second on, as `obs_names_make_unique` does, and say so.

    Names that are unique already come back as the same object. Call it on all cells of a file or request before these
    are cut into rows: a row alone cannot see the others' names.
    """
    if names.is_unique:
        return names, None
    taken, last = set(names), dict[str, int]()
    unique = names.to_numpy(dtype=object, copy=True)
    repeated = names.duplicated()
    for i in np.flatnonzero(repeated):
        name = unique[i]
        while (new := f"{name}-{last.setdefault(name, 0) + 1}") in taken:
            last[name] += 1
        last[name] += 1
        taken.add(new)
        unique[i] = new
    first = names[repeated][0]
    return pd.Index(unique, dtype=object), f"{int(repeated.sum())} repeated cell names got a suffix (first: {first!r})"


def string_labels(column: pd.Series) -> np.ndarray:
    """Return labels of any type as strings, "(missing)" for null: object, (cells,).

    Whole numbers are written without ".0": a null among a row's whole numbers makes floats of them, and a cell's label
    must not depend on other cells.

    Raises
    ------
    PayloadError
        A label is longer than `MAX_NAME`.
    """
    codes, values = pd.factorize(column)
    labels = [str(int(v)) if isinstance(v, (float, np.floating)) and v.is_integer() else str(v) for v in values]
    _refuse_long(labels, f"column {column.name!r}", "label")
    return np.array([*labels, MISSING_LABEL], dtype=object)[codes]  # a null has code -1


def missing_warning(labels: np.ndarray, column: str) -> str | None:
    """Say how many cells have no label in `column`, by what `string_labels` returned."""
    missing = int((labels == MISSING_LABEL).sum())
    return f"{missing} cells have no {column!r}: they form the group {MISSING_LABEL}" if missing else None


def log_base_warning(uns: Mapping[str, Any]) -> str | None:
    """Say when an AnnData states that its logarithms are not natural ones, by which scGPT was trained."""
    stated = uns.get("log1p")
    base = stated.get("base") if isinstance(stated, Mapping) else None
    if base is None or np.isclose(float(base), np.e):
        return None
    return f"uns['log1p'] says that X holds logarithms to base {float(base):g}; scGPT expects natural logarithms"


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
    split = {"columns": [str(c) for c in table.columns], "index": _names(table.index), "data": rows}
    return json.dumps(split, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def layer_names(adata: ad.AnnData) -> list[str]:
    """Return the layers without X, which anndata 0.13 lists among them as None."""
    return [name for name in adata.layers if name is not None]


def table_from_json(text: str, column: str) -> pd.DataFrame:
    """Read what `table_to_json` or pandas wrote; a PayloadError names `column`.

    Not with `pandas.read_json`: it turns names that look like numbers or dates into numbers and dates.
    """
    _require_text(text, column)
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
    if len(columns) > MAX_TABLE_COLUMNS:
        raise PayloadError(f"{column} has {len(columns):,} columns; the limit is {MAX_TABLE_COLUMNS:,}: drop some")
    if not columns and not data:
        data = [[]] * len(index)  # pandas leaves the rows out where there are no columns
    if len(data) != len(index):
        raise PayloadError(f"{column}: {len(index)} names in index, {len(data)} rows in data")
    for name, values in zip(index, data, strict=True):
        if not isinstance(values, list) or len(values) != len(columns):
            raise PayloadError(f"{column}: row {name!r} of data does not have the {len(columns)} columns' values")
    if any(isinstance(name, (list, dict)) for name in (*columns, *index)) or any(map(_is_missing, columns)):
        raise PayloadError(f"{column}: names in columns and index must be strings or numbers")
    _refuse_long((*columns, *index), column, "name")
    names = [str(name) for name in columns]
    if len(set(names)) != len(names):
        raise PayloadError(f"{column}: a column name is given twice")
    try:
        columns = {name: _column([row[j] for row in data]) for j, name in enumerate(names)}
        table = pd.DataFrame(columns, index=range(len(index)))
    except (ValueError, OverflowError, TypeError) as exc:
        raise PayloadError(f"{column}: no table can be made of it: {exc}") from exc
    table.index = pd.Index(_names(index), dtype=object)
    return table


def _refuse_long(texts: Iterable[Any], where: str, what: str, limit: int = MAX_NAME) -> None:
    """Reject texts of more than `limit` characters; what is not a string is short."""
    for text in texts:
        if isinstance(text, str) and len(text) > limit:
            raise PayloadError(
                f"{where} contains a {what} of {len(text):,} characters ({shortened(text)!r}); the limit is "
                f"{limit:,}: use a shorter {what}"
            )


def _names(index: Iterable[Any]) -> list[str | None]:
    return [None if _is_missing(name) else str(name) for name in index]


def _column(values: list[Any]) -> Any:
    """Keep strings as objects, so that None stays None: pandas 3 infers its own type of strings."""
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
    """Tell None and pandas' markers for it, as they stand in a DataFrame's cells."""
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)


def _given(row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    return None if _is_missing(value) else value


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _canonical_csr(x: Any) -> sp.csr_matrix:
    """Return X in CSR, its numbers in the machine's byte order, two entries of one gene added up; X stays as it is."""
    wanted = np.dtype(np.float32) if x.dtype == np.float16 else x.dtype.newbyteorder("=")  # scipy has no float16
    csr = sp.csr_matrix(x if x.dtype == wanted and x.dtype.isnative else x.astype(wanted))
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    return csr


def _cells(row: Mapping[str, Any]) -> tuple[pd.DataFrame, str | None]:
    """Read obs; names that repeat are made unique, and the warning says so."""
    given = _given(row, "adata_obs")
    obs = given if isinstance(given, pd.DataFrame) else table_from_json(_text(given, "adata_obs", "cell"), "adata_obs")
    names = pd.Index(_names(obs.index), dtype=object)
    if names.hasnans:
        raise PayloadError(f"adata_obs: {int(names.isna().sum())} cells have no name; give each cell one")
    names, warning = unique_cell_names(names)
    return obs.set_axis(names), warning


def _genes(row: Mapping[str, Any]) -> pd.DataFrame:
    """Read var, shared by the rows that have the same; a gene without a name gets ""."""
    given = _given(row, "adata_var")
    if isinstance(given, pd.DataFrame):
        return given.set_axis(pd.Index([name or "" for name in _names(given.index)], dtype=object))
    text = _text(given, "adata_var", "gene")
    return genes_from_json(text)


def _text(given: Any, column: str, what: str) -> str:
    if given is None:
        raise PayloadError(f"{column} is null: the row needs its table of {what}s")
    _require_text(given, column)
    return given


def _require_text(given: Any, column: str) -> None:
    if not isinstance(given, str):
        raise PayloadError(f"{column} must be a JSON string, not {type(given).__name__}")


@lru_cache(maxsize=SHARED_TABLES)
def _shared_genes(text: str) -> pd.DataFrame:
    """Keep the last tables; errors are not kept: each row gets its own."""
    return _genes_from_json(text)


def genes_from_json(text: str) -> pd.DataFrame:
    """Read `adata_var`, once for the rows that share it where it is not too long to keep; read only."""
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
            raise PayloadError(f"{column} says {stated!r}, but {where} has {found} rows")


def _dense(given: Any, n_obs: int, n_vars: int) -> sp.csr_matrix:
    if sp.issparse(given):
        matrix = sp.csr_matrix(given)
        # scipy lets anyone set the arrays; they are checked as if they came in columns
        data = matrix.data.view(np.uint8) if matrix.dtype == bool else matrix.data
        arrays = {"x_data": data, "x_indices": matrix.indices, "x_indptr": matrix.indptr}
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
    indptr = _whole_numbers(row["x_indptr"], "x_indptr").astype(np.int64)
    if len(indptr) != n_obs + 1:
        raise PayloadError(f"x_indptr has {len(indptr)} entries, {n_obs} cells in adata_obs want {n_obs + 1}")
    if indptr[0] != 0 or (indptr[1:] < indptr[:-1]).any():  # not by differences, which may overflow
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


def _place(x: sp.csr_matrix, entry: int) -> tuple[int, int]:
    """Return the cell and the gene of a stored entry."""
    return int(np.searchsorted(x.indptr, entry, side="right")) - 1, int(x.indices[entry])


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
    dtype = np.dtype(np.float32) if name == "float16" else _number_type(name)  # scipy has no float16
    data = _cast(x.data, dtype)
    lost = ~np.isfinite(data) if dtype.kind == "f" else ~_holds(data, x.data)
    if lost.any():
        raise PayloadError(f"x_dtype says {name}, which does not hold {x.data[np.argmax(lost)]}")
    return sp.csr_matrix((data, x.indices, x.indptr), x.shape)


def _stated_type(dtype: np.dtype, original: np.ndarray, values: np.ndarray) -> str:
    """Name the type that X had where `values`, its cast, still say it: by values that it holds, or by their kind.

    Whole numbers stay whole numbers when they are rounded; preprocessing looks at that.
    """
    if dtype.kind in "biu":
        held = _holds(_cast(values, dtype), values)
        return dtype.name if held.all() else values.dtype.name
    same = dtype.name in _NUMBER_TYPES and bool(_holds(values, original).all())
    return dtype.name if same else values.dtype.name


def _holds(cast: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Tell which values a cast to another number type left as they were."""
    same = _cast(cast, original.dtype) == original
    for whole, other in ((cast, original), (original, cast)):
        if whole.dtype.kind in "iu" and other.dtype.kind == "f":
            # casting back a float beyond the whole type's range is undefined: it may even give the original
            same &= other < 2.0 ** (8 * whole.dtype.itemsize - (whole.dtype.kind == "i"))
    return same


def _number_type(name: Any) -> np.dtype:
    if not isinstance(name, str) or name not in _NUMBER_TYPES:
        raise PayloadError(f"x_dtype is {name!r}, none of {', '.join(_NUMBER_TYPES)}")
    return np.dtype(name)


def _cast(values: np.ndarray, dtype: Any) -> np.ndarray:
    with np.errstate(all="ignore"):  # the caller looks whether a value was lost
        return values.astype(dtype)

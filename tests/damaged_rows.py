"""Rows as nobody should write them: hypothesis spoils good ones, a number or a bracket at a time."""

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from scgpt_batch.io.rows import to_row
from tests.helpers import random_adata

LAYOUTS = ("csr", "dense")
ROW_TYPES = {
    "adata_sparsematrix": pa.list_(pa.list_(pa.float64())),
    "x_data": pa.list_(pa.float32()),
    "x_indices": pa.list_(pa.int32()),
    "x_indptr": pa.list_(pa.int64()),
    "adata_obs": pa.string(),
    "adata_var": pa.string(),
    "n_obs": pa.int32(),
    "n_vars": pa.int32(),
    "x_dtype": pa.string(),
}

ODD_NUMBERS = [-1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e300, float("nan"), float("inf"), True, None, "1", "x", "\ud800"]
NUMBERS = st.one_of(st.integers(0, 4), st.sampled_from(ODD_NUMBERS), st.floats())
ANY_JSON = st.recursive(
    st.one_of(st.booleans(), NUMBERS, st.text(max_size=3)),
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.sampled_from(["columns", "index", "data"]), part),
    max_leaves=12,
)
TYPES = ["int8", "uint8", "int32", "uint64", "float16", "float32", "longdouble", "complex128", "M8[s]", "U3", "O"]


def plain(row: dict) -> dict:
    """Spell a row in Python's own types, as JSON has them."""
    return {
        name: [v.tolist() if isinstance(v, np.ndarray) else v for v in value]
        if isinstance(value, (list, np.ndarray))
        else value
        for name, value in row.items()
    } | {name: row[name].tolist() for name in ("x_data", "x_indices", "x_indptr") if row[name] is not None}


@st.composite
def damaged_rows(draw, genes: Sequence[str] | None = None) -> dict:
    """A good row of either layout, of which one or two columns are spoilt; `genes`: four names."""
    dtype = draw(st.sampled_from(["float32", "int64"]))
    adata = random_adata(3, 4, seed=draw(st.integers(0, 3)), dtype=dtype, genes=genes)
    row = plain(to_row(adata, layout=draw(st.sampled_from(LAYOUTS))))
    stated = {name: value for name, value in row.items() if value is not None}
    for name in draw(st.lists(st.sampled_from(list(stated)), min_size=1, max_size=2, unique=True)):
        row[name] = draw(damaged(row[name]))
    return row


@st.composite
def damaged(draw, value):
    """Spoil one column: a number or a bracket of it mostly, seldom all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(ANY_JSON | ANY_JSON.map(json.dumps))
    if isinstance(value, list):
        return draw(damaged_list(value))
    if not str(value).startswith("{"):  # n_obs, n_vars, x_dtype
        return draw(NUMBERS | st.sampled_from(TYPES))
    if draw(st.booleans()):
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(value))] * 2)))
        return value[:start] + draw(st.text(max_size=2)) + value[end:]
    split = json.loads(value)
    part = draw(st.sampled_from(sorted(split)))
    return json.dumps(split | {part: draw(damaged_list(split[part], ways=("replace", "drop", "add")))})


@st.composite
def damaged_list(draw, values: list, *, ways: tuple[str, ...] = ("replace", "replace", "drop", "add", "type")):
    """Replace, drop or add an entry, at any depth; sometimes hand all over as an array of another type."""
    values = list(values)
    at = draw(st.integers(0, max(len(values) - 1, 0)))
    way = draw(st.sampled_from(ways))
    if way == "type":
        try:
            return np.array(values, dtype=draw(st.sampled_from(TYPES)))
        except (ValueError, TypeError):
            return np.array(None)
    if values and isinstance(values[at], list) and draw(st.booleans()):
        values[at] = draw(damaged_list(values[at], ways=ways))
    elif way == "drop":
        del values[at:]
    elif way == "add":
        values.insert(at, draw(NUMBERS))
    else:
        values[at : at + 1] = [draw(NUMBERS | ANY_JSON)]
    return values

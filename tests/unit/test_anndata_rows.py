"""AnnData <-> row: exact round trips, and a PayloadError for whatever cannot be read."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp
from hypothesis import given, settings

from scgpt_batch.errors import PayloadError
from scgpt_batch.io.rows import (
    PAYLOAD_COLUMNS,
    arrow_rows,
    from_row,
    genes_from_json,
    is_empty,
    string_labels,
    table_from_json,
    table_to_json,
    to_row,
)
from tests.damaged_rows import LAYOUTS, ROW_TYPES, damaged_rows, plain
from tests.helpers import assert_close, random_adata

# Names that a reader who guesses types would turn into numbers, dates or missing values.
ODD_NAMES = ["1", "01", "1.0", "1e5", "2020-01-01", "MARCH1", "NaN", "null", "", " a ", "β-catenin", "遺伝子", "🧬"]
ODD_NAMES += ['say "hi"', "it's", "back\\slash", "line\nbreak", "tab\t", "null\x00byte"]


def through_arrow(*rows: dict, types: dict = ROW_TYPES) -> list[dict]:
    schema = pa.schema(list(types.items()))
    return list(arrow_rows(pa.RecordBatch.from_pylist([plain(row) for row in rows], schema)))


def dense_x(adata: ad.AnnData) -> np.ndarray:
    return adata.X.toarray() if sp.issparse(adata.X) else np.asarray(adata.X)


def assert_same_counts(found: ad.AnnData, wanted: ad.AnnData) -> None:
    assert found.X.dtype == wanted.X.dtype
    assert_close(dense_x(found), dense_x(wanted))
    assert found.obs_names.tolist() == wanted.obs_names.tolist()
    assert found.var_names.tolist() == wanted.var_names.tolist()


# Round trips


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored", ["sparse", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "int32", "int64", "uint8", "uint64"])
def test_values_and_type_of_x_come_back(layout, stored, dtype):
    adata = random_adata(7, 5, dtype=dtype, layout=stored)
    assert_same_counts(from_row(to_row(adata, layout=layout)), adata)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_x_of_bools_comes_back(layout):
    adata = ad.AnnData(sp.csr_matrix(np.eye(3, dtype=bool)))
    assert_same_counts(from_row(to_row(adata, layout=layout)), adata)


@pytest.mark.parametrize("make", [sp.csr_matrix, sp.csc_matrix, sp.csr_array], ids=lambda make: make.__name__)
def test_every_sparse_format_can_be_written(make):
    adata = random_adata(7, 5)
    adata.X = make(adata.X)
    assert_same_counts(from_row(to_row(adata)), adata)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_entries_that_scipy_adds_up_are_written_as_one(layout):
    adata = ad.AnnData(sp.csr_matrix(([1.0, 2.0, 4.0], [1, 0, 1], [0, 3]), (1, 2)))
    assert_close(dense_x(from_row(to_row(adata, layout=layout))), [[2, 5]])
    assert adata.X.nnz == 3, "the caller's matrix was changed"


def test_dense_layout_keeps_doubles_to_the_last_bit():
    adata = ad.AnnData(np.array([[0.1 + 0.2, 1e-308], [3e38, 5e-324]]))
    assert_same_counts(from_row(plain(to_row(adata, layout="dense"))), adata)


def test_anndata_without_x_is_rejected():
    with pytest.raises(PayloadError, match="no X"):
        to_row(ad.AnnData(obs=pd.DataFrame(index=["c"]), var=pd.DataFrame(index=["g"])))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_names_come_back(layout):
    genes = random_adata(len(ODD_NAMES), len(ODD_NAMES), genes=ODD_NAMES)
    genes.obs_names = ODD_NAMES
    assert_same_counts(from_row(json.loads(json.dumps(plain(to_row(genes, layout=layout))))), genes)


def test_obs_columns_come_back():
    adata = random_adata(9, 2)
    obs = from_row(to_row(adata)).obs
    assert obs.dtypes.astype(str).tolist() == ["object", "object", "int64", "float64", "bool"]
    wanted = adata.obs.astype({"donor": object, "cell_type": object})
    wanted.index = wanted.index.astype(object)
    pd.testing.assert_frame_equal(obs, wanted, check_exact=True)


def test_odd_values_of_obs_come_back():
    adata = random_adata(len(ODD_NAMES), 2)
    adata.obs["odd"] = ODD_NAMES
    adata.var['col "q" β'] = ["2020-01-01", None]
    back = from_row(to_row(adata))
    assert back.obs["odd"].tolist() == ODD_NAMES
    assert back.var['col "q" β'].tolist() == ["2020-01-01", None]


def test_floats_of_obs_come_back_to_the_last_bit():
    values = [0.1 + 0.2, 1e-308, 5e-324, 1.7976931348623157e308, -0.0, np.nan, 1.0]
    adata = random_adata(len(values), 2)
    adata.obs["f"] = values
    back = from_row(to_row(adata)).obs["f"]
    assert back.dtype == np.float64
    assert [v.hex() for v in back] == [v.hex() for v in values]


@pytest.mark.parametrize(
    ("column", "wanted"),
    [
        (pd.Categorical([3, None, 1]), ["3", None, "1"]),
        (pd.array([1, None, 3], dtype="Int64"), [1.0, np.nan, 3.0]),
        (pd.to_datetime(["2020-01-02", None, "2021-03-04"]), ["2020-01-02 00:00:00", None, "2021-03-04 00:00:00"]),
        ([np.inf, 1.5, None], ["inf", 1.5, None]),
        (np.array([1, 2, 3], dtype=np.float32), [1.0, 2.0, 3.0]),
        ([[1, 2], np.arange(2), "x"], ["[1, 2]", "[0 1]", "x"]),
    ],
    ids=["category of numbers", "nullable integers", "dates", "infinity", "float32", "lists"],
)
def test_column_of_another_type_comes_back_as_documented(column, wanted):
    adata = random_adata(3, 2)
    adata.obs["c"] = column
    back = from_row(to_row(adata)).obs["c"]
    dtype = object if any(isinstance(value, str) for value in wanted) else None
    pd.testing.assert_series_equal(back, pd.Series(wanted, back.index, name="c", dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_row_survives_arrow(layout):
    adatas = [random_adata(n, 5, seed=n) for n in (1, 4, 6)]
    rows = through_arrow(*(to_row(adata, layout=layout) for adata in adatas))
    for row, adata in zip(rows, adatas, strict=True):
        assert_same_counts(from_row(row), adata)


def test_row_survives_arrow_with_large_lists_and_both_layouts():
    large = {"adata_sparsematrix": pa.large_list(pa.large_list(pa.float64())), "x_data": pa.large_list(pa.float32())}
    adata = random_adata(4, 5)
    rows = [to_row(adata, layout=layout) for layout in LAYOUTS]
    csr, dense = through_arrow(*rows, types=ROW_TYPES | large)
    assert isinstance(csr["x_data"], pa.FloatArray) and isinstance(dense["adata_sparsematrix"], pa.LargeListArray)
    for row in (csr, dense):
        assert_same_counts(from_row(row), adata)


def test_arrow_rows_are_not_turned_into_lists():
    (row,) = through_arrow(to_row(random_adata(4, 5)))
    assert isinstance(row["x_data"], pa.FloatArray)
    assert row["adata_sparsematrix"] is None


def test_reading_leaves_the_callers_arrays_alone():
    arrays = {
        "x_data": np.array([2, 0, 3], np.float32),
        "x_indices": np.array([2, 0, 1]),
        "x_indptr": np.array([0, 2, 3]),
    }
    before = {name: values.copy() for name, values in arrays.items()}
    from_row(small_row(**arrays))
    for name, values in before.items():
        assert_close(arrays[name], values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_json_that_pandas_wrote_is_read(layout):
    adata = random_adata(4, 13, genes=ODD_NAMES[:13])
    row = plain(to_row(adata, layout=layout)) | {
        "adata_obs": adata.obs.to_json(orient="split"),
        "adata_var": adata.var.to_json(orient="split"),
    }
    back = from_row(row)
    assert_same_counts(back, adata)
    assert back.obs["cell_type"].tolist() == adata.obs["cell_type"].tolist()
    assert_close(back.obs["score"], adata.obs["score"], atol=1e-10)  # pandas writes ten decimals


def test_objects_of_a_notebook_are_read():
    adata = random_adata(4, 5)
    row = {"adata_sparsematrix": adata.X, "adata_obs": adata.obs, "adata_var": adata.var}
    assert_same_counts(from_row(row), adata)


def test_tables_with_number_names_are_read():
    obs, var = pd.DataFrame(index=[0, 1]), pd.DataFrame({7: [1, 2, 3]}, index=[10, 20, 30])
    back = from_row({"adata_sparsematrix": np.ones((2, 3)), "adata_obs": obs, "adata_var": var})
    assert back.var_names.tolist() == ["10", "20", "30"]
    assert obs.index.tolist() == [0, 1], "the caller's table was changed"


def test_explicit_zeros_are_dropped():
    assert from_row(small_row(x_data=[1, 0, 3])).X.nnz == 2


def test_unsorted_indices_are_read():
    assert_close(from_row(small_row(x_data=[2, 1, 3], x_indices=[2, 0, 1])).X.toarray(), SMALL)


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA], ids=["None", "NaN", "NA"])
def test_missing_markers_mean_not_given(missing):
    row = small_row(adata_sparsematrix=missing, n_obs=missing, n_vars=missing, x_dtype=missing)
    assert_close(from_row(row).X.toarray(), SMALL)
    assert is_empty(dict.fromkeys(PAYLOAD_COLUMNS, missing))
    assert not is_empty(row)


def test_stated_type_may_round_to_a_shorter_float():
    x = from_row(small_dense([[0.1, 1e-300, 2], [0, 3, 0]], x_dtype="float32")).X
    assert_close(x.toarray(), [[np.float32(0.1), 0, 2], [0, 3, 0]])
    assert x.nnz == 3


# Damage

SMALL = [[1, 0, 2], [0, 3, 0]]


def table(index: list, **columns: list) -> str:
    data = [list(values) for values in zip(*columns.values(), strict=True)] if columns else [[] for _ in index]
    return json.dumps({"columns": list(columns), "index": index, "data": data})


TABLES = {"adata_obs": table(["c0", "c1"], donor=["a", "b"]), "adata_var": table(["g0", "g1", "g2"])}


def small_row(**changes) -> dict:
    return {"x_data": [1, 2, 3], "x_indices": [0, 2, 1], "x_indptr": [0, 2, 3]} | TABLES | changes


def small_dense(matrix, **changes) -> dict:
    return {"adata_sparsematrix": matrix} | TABLES | changes


def small_scipy(**arrays) -> dict:
    """scipy checks what it is made of, but lets anyone set the arrays afterwards."""
    matrix = sp.csr_matrix(np.array(SMALL))
    for name, values in arrays.items():
        setattr(matrix, name, np.array(values))
    return small_dense(matrix)


def test_small_rows_are_good():
    for row in (small_row(), small_dense(SMALL), small_scipy()):
        assert_close(from_row(row).X.toarray(), SMALL)


DAMAGE = {
    # the CSR columns
    "index too large": (small_row(x_indices=[0, 3, 1]), "x_indices contains 3, but the genes of adata_var are 0 to 2"),
    "index negative": (small_row(x_indices=[0, 2, -1]), "x_indices contains -1"),
    "index beyond int64": (small_row(x_indices=[0, 2, 2**63]), "x_indices .* whole numbers below 2\^53"),
    "index beyond int64, unsigned": (
        small_row(x_indices=np.array([0, 2, 2**63], np.uint64)),
        "x_indices .* whole numbers below 2\^53",
    ),
    "index beyond float64": (small_row(x_indices=[0, 2, 10**400]), "x_indices must contain numbers"),
    "index fractional": (small_row(x_indices=[0, 1.5, 1]), "x_indices must contain .*fractions"),
    "index NaN": (small_row(x_indices=[0, float("nan"), 1]), "x_indices must contain whole numbers .*NaN"),
    "index null": (small_row(x_indices=[0, None, 1]), "x_indices contains 1 nulls"),
    "index text": (small_row(x_indices=["0", "2", "1"]), "x_indices must contain numbers"),
    "gene twice in a cell": (small_row(x_indices=[2, 2, 1]), "x_indices contains the same gene twice"),
    "indptr falls": (small_row(x_indptr=[0, 4, 3]), "x_indptr must start at 0 and never decrease"),
    "indptr falls, unsigned": (small_row(x_indptr=np.array([0, 4, 3], np.uint64)), "x_indptr .*never decrease"),
    "indptr falls, int8": (
        small_row(x_indptr=np.array([0, 100, -100, 3], np.int8), adata_obs=table(["a", "b", "c"])),
        "x_indptr .*never decrease",
    ),
    "indptr with overflowing differences": (
        small_row(x_indptr=[0, 2**63 - 1, -(2**63), -1, 3], adata_obs=table(["a", "b", "c", "d"])),
        "x_indptr .*never decrease",
    ),
    "indptr starts late": (small_row(x_indptr=[1, 2, 3]), "x_indptr must start at 0"),
    "indptr ends early": (small_row(x_indptr=[0, 1, 2]), "x_indptr ends at 2, but x_data has 3 values"),
    "indptr ends late": (small_row(x_indptr=[0, 2, 4]), "x_indptr ends at 4"),
    "indptr short": (small_row(x_indptr=[0, 3]), "x_indptr has 2 entries, but 2 cells in adata_obs need 3"),
    "indptr long": (small_row(x_indptr=[0, 2, 3, 3]), "x_indptr has 4 entries"),
    "indptr empty": (small_row(x_indptr=[]), "x_indptr has 0 entries"),
    "data short": (small_row(x_data=[1, 2]), "x_data has 2 values, but x_indices has 3"),
    "indices short": (small_row(x_indices=[0, 2]), "x_data has 3 values, but x_indices has 2"),
    "data NaN": (small_row(x_data=[1, float("nan"), 3]), "x_data contains NaN .*cell 0, gene 'g2'"),
    "data infinite": (small_row(x_data=[1, 2, float("inf")]), "x_data contains .*infinity .*cell 1, gene 'g1'"),
    "data beyond float64": (small_row(x_data=[1, 2, 10**400]), "x_data must contain numbers"),
    "data negative": (small_row(x_data=[1, 2, -3]), "x_data contains negative values \\(first: cell 1, gene 'g1'\\)"),
    "data null": (small_row(x_data=[1, None, 3]), "x_data contains 1 nulls"),
    "data text": (small_row(x_data=["1", "2", "3"]), "x_data must contain numbers"),
    "data bools": (small_row(x_data=[True, False, True]), "x_data must contain numbers"),
    "data bools among numbers": (small_row(x_data=[True, 2**70, 3]), "x_data must contain numbers.* bool"),
    "data complex": (small_row(x_data=[1j, 2, 3]), "x_data must contain numbers"),
    "data dates": (small_row(x_data=np.array([1, 2, 3], "M8[D]")), "x_data must contain numbers"),
    "data nested": (small_row(x_data=[[1], [2], [3]]), "x_data must be a flat list"),
    "data ragged": (small_row(x_data=[[1], [2, 3]]), "x_data contains lists of different lengths"),
    "data a string": (small_row(x_data="123"), "x_data must be a flat list"),
    "data an object": (small_row(x_data={"0": 1}), "x_data must be a flat list"),
    # dense
    "dense ragged": (small_dense([[1, 0, 2], [0, 3]]), "adata_sparsematrix: cell 1 has 2 values, but adata_var has 3"),
    "dense cell too few": (small_dense([[1, 0, 2]]), "adata_sparsematrix has 1 cells, but adata_obs has 2"),
    "dense flat": (small_dense([1, 2]), "adata_sparsematrix: cell 0 must be a flat list"),
    "dense too deep": (small_dense([[[1], [0], [2]]] * 2), "adata_sparsematrix: cell 0 must be a flat list"),
    "dense null": (small_dense([[1, None, 2], [0, 3, 0]]), "adata_sparsematrix: cell 0 contains 1 nulls"),
    "dense null cell": (small_dense([[1, 0, 2], None]), "adata_sparsematrix: cell 1 must be a flat list"),
    "dense text": (small_dense([["1", "0", "2"], [0, 3, 0]]), "adata_sparsematrix: cell 0 must contain numbers"),
    "dense NaN": (small_dense([[1, 0, 2], [0, float("nan"), 0]]), "sparsematrix contains NaN .*cell 1, gene 'g1'"),
    "dense infinite": (small_dense([[float("inf"), 0, 2], [0, 3, 0]]), "adata_sparsematrix contains .*infinity"),
    "dense negative": (small_dense([[1, 0, -2], [0, 3, 0]]), "sparsematrix contains negative .*cell 0, gene 'g2'"),
    "dense a number": (small_dense(np.array(1.0)), "adata_sparsematrix must be a list of lists"),
    "dense a string": (small_dense("[[1]]"), "adata_sparsematrix must be a list of lists, not str"),
    "scipy of another shape": (small_dense(sp.csr_matrix((3, 2))), r"adata_sparsematrix has the shape \(3, 2\)"),
    "scipy index too large": (small_scipy(indices=[0, 2, 9]), "x_indices contains 9"),
    "scipy indptr falls": (small_scipy(indptr=[0, 9, 3]), "x_indptr .*never decrease"),
    "scipy complex": (small_dense(sp.csr_matrix(np.array(SMALL) * 1j)), "x_data must contain numbers"),
    # which matrix
    "no matrix": (TABLES, "no matrix: x_data, x_indices, x_indptr and adata_sparsematrix are null"),
    "half a matrix": (small_row(x_indptr=None), "no matrix: x_indptr"),
    "two matrices": (small_row(adata_sparsematrix=SMALL), "adata_sparsematrix and x_data, .* are both given"),
    # what the row says of itself
    "n_obs disagrees": (small_row(n_obs=3), "n_obs is 3, but adata_obs has 2 rows"),
    "n_vars disagrees": (small_row(n_vars=2), "n_vars is 2, but adata_var has 3 rows"),
    "n_obs a string": (small_row(n_obs="2"), "n_obs is '2'"),
    "n_obs a list": (small_row(n_obs=np.array([2, 2])), "n_obs is array"),
    "x_dtype unknown": (small_row(x_dtype="float12"), "x_dtype is 'float12', but must be one of"),
    "x_dtype no number": (small_row(x_dtype="str"), "x_dtype is 'str'"),
    "x_dtype no name": (small_row(x_dtype=["int32"]), "x_dtype is"),
    "x_dtype cuts fractions": (small_row(x_data=[1, 2.5, 3], x_dtype="int32"), r"x_dtype is int32, .*2\.5"),
    "x_dtype overflows": (small_row(x_data=[1, 200, 3], x_dtype="int8"), r"x_dtype is int8, .*200"),
    "x_dtype overflows float32": (
        small_row(x_data=[1e300, 2, 3], x_dtype="float32"),
        "x_data .* outside the range of float32",
    ),
    # obs and var
    "obs missing": (small_row(adata_obs=None), "adata_obs is null; every row needs its table of cells"),
    "var missing": (small_row(adata_var=None), "adata_var is null; every row needs its table of genes"),
    "obs too short": (small_row(adata_obs=table(["c0"])), "x_indptr has 3 entries, but 1 cells in adata_obs"),
    "obs too long": (small_dense(SMALL, adata_obs=table(list("abc"))), "has 2 cells, but adata_obs has 3"),
    "var too short": (
        small_row(adata_var=table(["g0", "g1"])),
        "x_indices contains 2, but the genes of adata_var are 0 to 1",
    ),
    "var too long": (small_dense(SMALL, adata_var=table(list("abcd"))), "cell 0 has 3 values, but adata_var has 4"),
    "cell without a name": (small_row(adata_obs=table(["c0", None])), "adata_obs: 1 cells have no name"),
    "no cells": (small_row(adata_obs=table([]), x_indptr=[0]), "the row is empty: adata_obs has 0 cells"),
    "no cells, dense": (small_dense([], adata_obs=table([])), "the row is empty: adata_obs has 0 cells"),
    "no genes": (small_dense([[], []], adata_var=table([])), "the row is empty: .* adata_var 0 genes"),
    "obs no JSON": (small_row(adata_obs="cell,donor\nc0,a"), "adata_obs is not JSON"),
    "obs empty text": (small_row(adata_obs=""), "adata_obs is not JSON"),
    "obs too deep": (small_row(adata_obs="[" * 100_000), "adata_obs is not JSON"),
    "obs endless number": (small_row(adata_obs="1" * 5000), "adata_obs is not JSON"),
    "obs half a surrogate": (small_row(adata_obs=table(["c0", "\ud800"])), "adata_obs is not JSON: .*surrogates"),
    "obs bytes": (small_row(adata_obs=b"{}"), "adata_obs must be a JSON string, not bytes"),
    "var a number": (small_row(adata_var="3"), 'adata_var must be pandas JSON, orient="split"'),
    "var of another orient": (small_row(adata_var='{"g0": {"a": 1}}'), 'adata_var must be .* orient="split"'),
    "var without index": (small_row(adata_var='{"columns": [], "data": []}'), 'adata_var must be .* orient="split"'),
    "var index no list": (small_row(adata_var='{"columns":[],"index":"abc","data":[]}'), "adata_var: .*must be lists"),
    "var data short": (
        small_row(adata_var='{"columns":["a"],"index":["x","y","z"],"data":[[1]]}'),
        "adata_var: index has 3 names, but data has 1 rows",
    ),
    "var data ragged": (
        small_row(adata_var='{"columns":["a"],"index":["x","y","z"],"data":[[1],[1,2],[3]]}'),
        "adata_var: row 'y' of data must be a list of 1 values",
    ),
    "var name nested": (small_row(adata_var=table(["g0", ["x"], "g2"])), "adata_var: names .* must be strings"),
    "var name of 1,001 characters": (
        small_row(adata_var=table(["g0", "g1", "x" * 1_001])),
        "adata_var contains a name of 1,001 characters .* the limit is 1,000",
    ),
    "cell name of 10,000,000 characters": (
        small_row(adata_obs=table(["a", "x" * 10_000_000])),
        "adata_obs contains a name of 10,000,000 characters .* the limit is 1,000",
    ),
    "adata_id of 8,001 characters": (small_row(adata_id="x" * 8_001), "adata_id contains a key of 8,001 characters"),
    "sample_id of 8,001 characters": (small_row(sample_id="x" * 8_001), "sample_id contains a key of 8,001 characters"),
    "var column twice": (
        small_row(adata_var='{"columns":["a","a"],"index":["x"],"data":[[1,2]]}'),
        "adata_var: a column name is repeated",
    ),
}


@pytest.mark.parametrize(("row", "message"), DAMAGE.values(), ids=DAMAGE)
def test_error_names_the_damaged_column(row, message):
    with pytest.raises(PayloadError, match=message):
        from_row(row)


def test_nulls_in_arrow_arrays_are_named():
    good = to_row(random_adata(2, 3, seed=2))
    for name in ("x_data", "x_indices", "x_indptr"):
        (row,) = through_arrow(good | {name: np.array([None, *good[name][1:].tolist()])})
        with pytest.raises(PayloadError, match=f"{name} contains 1 nulls"):
            from_row(row)


@pytest.mark.parametrize("cells", [[[1, None, 2], [0, 3, 0]], [[1, 0, 2], None]], ids=["value", "cell"])
def test_nulls_in_arrow_matrix_are_named(cells):
    (row,) = through_arrow(dict.fromkeys(ROW_TYPES) | small_dense(cells))
    with pytest.raises(PayloadError, match="adata_sparsematrix contains 1 nulls"):
        from_row(row)


def test_rows_share_a_gene_table_but_not_changes(monkeypatch):
    genes = table(["s0", "s1", "s2"], symbol=["A", "B", "C"])
    read = []
    monkeypatch.setattr(json, "loads", lambda text, loads=json.loads: read.append(text) or loads(text))
    first = from_row(small_row(adata_var=genes))
    first.var.loc["s0", "symbol"] = "changed"
    first.var["mine"] = 1
    first.var_names = ["x", "y", "z"]
    second = from_row(small_row(adata_var=genes))
    assert read.count(genes) == 1
    assert second.var.to_dict() == {"symbol": {"s0": "A", "s1": "B", "s2": "C"}}


def test_each_row_with_unreadable_genes_fails():
    for _ in range(2):
        with pytest.raises(PayloadError, match="adata_var is not JSON"):
            from_row(small_row(adata_var="{"))


# Random damage


@given(damaged_rows())
@settings(max_examples=500, derandomize=True, deadline=None)
def test_random_damage_is_read_or_rejected(row):
    try:
        adata = from_row(row)
    except PayloadError as exc:
        assert str(exc).encode(), "the message must be fit for a table"
        return
    assert adata.shape == tuple(len(json.loads(row[name])["index"]) for name in ("adata_obs", "adata_var"))
    assert adata.n_obs and adata.n_vars
    assert np.isfinite(adata.X.data).all() and (adata.X.data > 0).all()
    assert table_to_json(adata.obs).encode() and table_to_json(adata.var).encode()


@pytest.mark.parametrize("given", [[], {"index": []}, 1, b"{}"], ids=["list", "object", "number", "bytes"])
def test_a_table_that_is_not_text_is_a_payload_error(given):
    for read in (genes_from_json, lambda table: table_from_json(table, "adata_var")):
        with pytest.raises(PayloadError, match="adata_var must be a JSON string"):
            read(given)


def test_a_long_label_is_named():
    with pytest.raises(PayloadError, match=r"column 'donor' contains a label of 1,001 characters \('xxx.*1,000"):
        string_labels(pd.Series(["a", "x" * 1_001], name="donor"))
    assert string_labels(pd.Series(["x" * 1_000])).tolist() == ["x" * 1_000]

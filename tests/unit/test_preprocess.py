"""Preprocessing, binning and tokens: equal to the published package, and the same for a cell wherever it is."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import anndata as ad
import numba
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import scgpt_batch
from scgpt_batch.errors import PayloadError, PreprocessError
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.binning import bin_range, bin_values, cell_noise, gene_hash
from scgpt_batch.preprocessing.hvg import by_dispersion, mean_var
from scgpt_batch.preprocessing.pipeline import (
    HVG_ERRORS,
    binned_layer,
    group_labels,
    preprocess,
    quiet_libraries,
    value_warning,
)
from scgpt_batch.preprocessing.tokens import sample_long_cells, tokenize
from tests.helpers import assert_close, random_adata
from tests.paths import DATA, REPO

PACKAGE = Path(scgpt_batch.__file__).parent
RAW_V3 = ("raw_v3", "raw_v3_batch")  # scanpy ranks these genes with an unstable sort
EXACT = ("seed", "seed_batch", "raw_nohvg", "raw_nohvg_cellfilter")
CASES = EXACT + RAW_V3


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / "golden" / f"{name}.npz") as arrays:
        return dict(arrays)


@cache
def pbmc3k() -> ad.AnnData:
    return ad.read_h5ad(DATA / "pbmc3k.h5ad")[golden("preprocess_input")["cell_index"]].copy()


def cells_of(case: str) -> ad.AnnData:
    """The case's input; var["column"] says where a gene stands in the file."""
    given, raw = golden("preprocess_input"), pbmc3k().X
    logged = sp.csr_matrix((given["log1p_data"], raw.indices, raw.indptr), raw.shape)
    obs = pd.DataFrame({"batch": given["batch"]}, index=given["cell_names"])
    var = pd.DataFrame({"column": np.arange(raw.shape[1])}, index=pbmc3k().var_names)
    return ad.AnnData(logged if case.startswith("seed") else raw.copy(), obs=obs, var=var)


def parameters_of(case: str, **changes) -> Parameters:
    params = json.loads(str(golden(f"preprocess_{case}")["params"]))
    params["min_cell_counts"] = float(params.pop("filter_cell_by_counts"))  # a number there, a boolean here
    del params["input"]
    return Parameters.create(params, changes)


@cache
def survivors(case: str) -> ad.AnnData:
    return preprocess(cells_of(case), parameters_of(case))


@cache
def before_the_cut(case: str) -> tuple[ad.AnnData, Parameters]:
    """All genes that pass the filters, so that golden's choice of variable genes can be taken."""
    parameters = parameters_of(case, subset_hvg=0)
    adata = preprocess(cells_of(case), parameters)
    column = {c: i for i, c in enumerate(adata.var["column"])}
    genes = [column[c] for c in golden(f"preprocess_{case}")["gene_index"]]
    return adata[:40, genes].copy(), parameters


@cache
def normalised_variances(case: str) -> pd.DataFrame:
    """What seurat_v3 ranks: one column a batch, NaN below the batch's cut, one line a gene of the file."""
    adata = preprocess(cells_of(case), parameters_of(case, subset_hvg=0))
    batches = adata.obs["batch"] if parameters_of(case).batch_key else pd.Series("all", adata.obs_names)
    ranked = {}
    for batch in batches.unique():
        part = adata[batches == batch].copy()
        sc.pp.highly_variable_genes(part, n_top_genes=1200, flavor="seurat_v3")
        value = part.var.set_index("column")["variances_norm"]
        ranked[batch] = value.where(value >= value.nlargest(1200).iloc[-1])
    return pd.DataFrame(ranked)


def tied_genes(case: str) -> set[int]:
    """Genes whose rank in some batch is left to the sort."""
    values = normalised_variances(case)
    tied = values.apply(lambda column: column.duplicated(keep=False) & column.notna()).any(axis=1)
    return set(values.index[tied])


def sparse_of(arrays: dict[str, np.ndarray], name: str) -> sp.csr_matrix:
    parts = (arrays[f"{name}_{part}"] for part in ("data", "indices", "indptr"))
    return sp.csr_matrix(tuple(parts), arrays[f"{name}_shape"])


def assert_close_sparse(found: sp.csr_matrix, wanted: sp.csr_matrix, **tolerance) -> None:
    assert found.indptr.tolist() == wanted.indptr.tolist()
    assert found.indices.tolist() == wanted.indices.tolist()
    assert_close(found.data, wanted.data, **tolerance)


# Parity with the published package


@pytest.mark.parametrize("case", EXACT)
def test_surviving_genes_are_upstreams(case):
    assert survivors(case).var["column"].tolist() == golden(f"preprocess_{case}")["gene_index"].tolist()


@pytest.mark.parametrize("case", CASES)
def test_surviving_cells_are_upstreams(case):
    wanted = golden("preprocess_input")["cell_names"][golden(f"preprocess_{case}")["cell_pos"]]
    assert survivors(case).obs_names.tolist() == wanted.tolist()


def test_variable_genes_of_seurat_v3_differ_at_the_cut_alone():
    found, wanted = survivors("raw_v3").var["column"].tolist(), golden("preprocess_raw_v3")["gene_index"].tolist()
    cut = normalised_variances("raw_v3")["all"].min()
    assert found == sorted(found) and len(found) == len(wanted)
    differ = sorted(set(found) ^ set(wanted))
    assert len(set(found) - set(wanted)) <= 0.01 * len(wanted)
    assert_close(normalised_variances("raw_v3").loc[differ, "all"], np.full(len(differ), cut))


def test_seurat_v3_genes_in_batches_differ_only_by_ties():
    found = survivors("raw_v3_batch").var["column"].tolist()
    wanted = golden("preprocess_raw_v3_batch")["gene_index"].tolist()
    assert found == sorted(found) and len(found) == len(wanted)
    assert len(set(found) - set(wanted)) <= 0.01 * len(wanted)
    assert set(found) ^ set(wanted) <= tied_genes("raw_v3_batch")


@pytest.mark.parametrize("case", CASES)
def test_gene_statistics_are_scanpys(case):
    wanted, found = golden(f"preprocess_{case}"), survivors(case).var.set_index("column")
    left_to_the_sort = tied_genes(case) if case in RAW_V3 else set()
    for name in (name for name in wanted if name.startswith("var_")):
        left_out = left_to_the_sort if name.startswith("var_highly_variable") else set()
        common = [c for c in wanted["gene_index"] if c in found.index and c not in left_out]
        assert len(common) > 300
        values = pd.Series(wanted[name], wanted["gene_index"])
        assert_close(found.loc[common, name.removeprefix("var_")], values[common], rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_normalised_values_are_upstreams(case):
    adata, wanted = before_the_cut(case)[0], golden(f"preprocess_{case}")
    assert_close_sparse(adata.layers["X_normed"], sparse_of(wanted, "normed"), rtol=1e-5)
    assert ("log1p_data" in wanted) == case.startswith("raw")
    if "log1p_data" in wanted:
        assert_close_sparse(adata.layers["X_log1p"], sparse_of(wanted, "log1p"), rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_bins_are_upstreams(case):
    (adata, parameters), wanted = before_the_cut(case), golden(f"preprocess_{case}")
    matrix = binned_layer(adata, parameters)
    lower, upper, edges = bin_range(matrix.data, matrix.indptr, parameters.binning)
    assert matrix.indices.tolist() == wanted["bin_indices"].tolist()
    assert_close(lower, wanted["bin_lower"])
    assert_close(upper, wanted["bin_upper"])
    assert_close(np.insert(edges, 0, 0, axis=1), wanted["bin_edges"], rtol=1e-6)
    assert (lower <= wanted["bin_actual_seed0"]).all() and (wanted["bin_actual_seed0"] <= upper).all()


@pytest.mark.parametrize("name", ["nonzero", "allgenes"])
def test_tokens_are_upstreams(name):
    arrays = golden("tokenize")
    binned, (n_cells, n_genes) = arrays["binned"], arrays["binned"].shape
    matrix = sp.csr_matrix(binned.astype(np.float32))
    if name == "allgenes":  # zeros are stored
        every = np.tile(np.arange(n_genes), n_cells), np.arange(n_cells + 1) * n_genes
        matrix = sp.csr_matrix((binned.ravel().astype(np.float32), *every), binned.shape)
    tokens, _ = tokenize(matrix, arrays["gene_ids"], cls_id=2501, cls_value=0)
    present = np.arange(tokens.lengths.max()) < tokens.lengths[:, None]
    for found, padding, wanted in ((tokens.genes, 2500, "genes"), (tokens.values, -2, "values")):
        padded = np.full(present.shape, padding, found.dtype)
        padded[present] = found
        assert_close(padded, arrays[f"{name}_{wanted}"])


# The steps


def small(n_obs: int = 60, n_vars: int = 40, **changes) -> ad.AnnData:
    adata = random_adata(n_obs, n_vars, **changes)
    adata.obs["batch"] = np.where(np.arange(n_obs) % 2, "odd", "even")
    return adata


def prepared(adata: ad.AnnData, *, genes_only=False, whole_numbers=False, **parameters) -> ad.AnnData:
    parameters = Parameters.create({"filter_gene_by_counts": 0, "normalize_total": 0, "subset_hvg": 0}, parameters)
    return preprocess(adata.copy(), parameters, genes_only=genes_only, whole_numbers=whole_numbers)


def totals(*sums: float) -> ad.AnnData:
    """Two genes; the cells' (or, transposed, the genes') sums."""
    return ad.AnnData(sp.csr_matrix([[s / 2, s / 2] for s in sums], dtype=np.float32))


@pytest.mark.parametrize(("least", "kept"), [(0, 4), (1, 2), (3, 1), (True, 2), (False, 4)], ids=str)
def test_gene_filter_keeps_sums_from_the_threshold(least, kept):
    adata = totals(0, 0.5, 1, 3).T.copy()
    adata.X = sp.csr_matrix(adata.X)
    assert prepared(adata, filter_gene_by_counts=least).var_names.tolist() == ["0", "1", "2", "3"][4 - kept :]


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [({}, 4), ({"filter_cell_by_counts": True}, 2), ({"min_cell_counts": 1}, 2), ({"min_cell_counts": 2.5}, 1)],
    ids=str,
)
def test_cell_filter_keeps_sums_from_the_threshold(parameters, kept):
    adata = prepared(totals(0, 0.5, 1, 3), **parameters)
    assert adata.obs_names.tolist() == ["0", "1", "2", "3"][4 - kept :]


def test_filters_come_before_normalising():
    adata = ad.AnnData(sp.csr_matrix([[1.0, 8, 0], [1, 2, 6]], dtype=np.float32))
    found = prepared(adata, filter_gene_by_counts=3, normalize_total=8)
    assert_close(found.layers["X_normed"].toarray(), [[8, 0], [2, 6]])
    assert_close(found.X.toarray(), [[8, 0], [2, 6]])


def test_cut_keeps_layers_and_order():
    adata = small()
    cut = prepared(adata, normalize_total=100, log1p=True, subset_hvg=10)
    uncut = prepared(adata, normalize_total=100, log1p=True)[:, cut.var_names]
    assert 10 <= cut.n_vars < 15  # ties at the cut stay in
    assert cut.var_names.tolist() == [name for name in adata.var_names if name in cut.var_names]
    for layer in ("X_normed", "X_log1p"):
        assert_close(cut.layers[layer].toarray(), uncut.layers[layer].toarray())


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 400), st.integers(1, 500), st.booleans())
def test_choice_by_cell_ranger_is_scanpys_bit_for_bit(seed, n_obs, n_vars, n_top, counts):
    rng = np.random.default_rng(seed)
    x = sp.random(n_obs, n_vars, rng.choice([0.05, 0.5, 0.9]), "csr", np.float32, rng)
    if counts:  # many equal means and dispersions
        x.data = np.ceil(5 * x.data)
    adata = ad.AnnData(x)
    wanted = scanpys_genes(adata, n_top_genes=n_top, flavor="cell_ranger")
    if wanted is not None:
        wanted = wanted[wanted["highly_variable"]]
    if wanted is None or not len(wanted):
        if n_top >= n_vars:  # no choice is needed
            assert prepared(adata, subset_hvg=n_top).n_vars == n_vars
            return
        with pytest.raises(PreprocessError, match=r"cannot select|no gene is variable"):
            prepared(adata, subset_hvg=n_top)
        return
    found = prepared(adata, subset_hvg=n_top).var
    assert found.index.tolist() == wanted.index.tolist()
    for name in ("highly_variable", "means", "dispersions", "dispersions_norm"):
        assert found[name].to_numpy().astype(wanted[name].dtype).tobytes() == wanted[name].to_numpy().tobytes()


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 400), st.integers(1, 500), st.integers(1, 2))
def test_choice_by_seurat_is_scanpys_bit_for_bit(seed, n_obs, n_vars, n_top, threads):
    rng = np.random.default_rng(seed)
    adata = ad.AnnData(sp.random(n_obs, n_vars, rng.choice([0.05, 0.5, 0.9]), "csr", np.float32, rng))
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        mean, var = mean_var(np.expm1(adata.X))
        wanted = scanpys_genes(adata, n_top_genes=n_top, flavor="seurat")
        with quiet_libraries():
            if wanted is None:
                with pytest.raises(HVG_ERRORS):
                    by_dispersion(mean, var, n_top, "seurat")
                return
            found = by_dispersion(mean, var, n_top, "seurat")
    finally:
        numba.set_num_threads(before)
    for name in ("highly_variable", "means", "dispersions", "dispersions_norm"):
        assert found[name].tobytes() == wanted[name].to_numpy().astype(found[name].dtype).tobytes()


def scanpys_genes(adata: ad.AnnData, **arguments) -> pd.DataFrame | None:
    """What scanpy says about each gene; None where it cannot choose."""
    try:
        with quiet_libraries():
            return sc.pp.highly_variable_genes(adata, inplace=False, **arguments)
    except HVG_ERRORS:
        return None


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(20, 80), st.integers(100, 300), st.integers(1, 400), st.booleans())
def test_choice_by_seurat_v3_is_scanpys_bit_for_bit(seed, n_obs, n_vars, n_top, integer):
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(1, 3, n_vars), (n_obs, n_vars)) * (1 if integer else rng.random((n_obs, 1)))
    adata = ad.AnnData(sp.csr_matrix(x.astype(np.float32)))
    wanted = scanpys_genes(adata, n_top_genes=n_top, flavor="seurat_v3")
    found = prepared(adata, subset_hvg=n_top, hvg_flavor="seurat_v3").var
    assert found.index.tolist() == wanted.index[wanted["highly_variable"]].tolist()
    for name in ("means", "variances", "variances_norm", "highly_variable_rank"):
        assert found[name].to_numpy().tobytes() == wanted.loc[found.index, name].to_numpy().tobytes()


def test_package_imports_no_private_name_of_another_package():
    private = re.compile(r"^ *(?:from|import) (?!scgpt_batch)\w+(?:\S*\._| ?.*import .*\b_).*", re.MULTILINE)
    assert private.search("from scanpy.preprocessing._utils import njit")
    assert private.search("from scanpy.preprocessing import one, _two")
    assert {path.name: found for path in PACKAGE.rglob("*.py") if (found := private.findall(path.read_text()))} == {}


# rows and samples fit by `fit_curve` alone
FUZZ = """
import numpy as np, scipy.sparse as sp
from scgpt_batch.errors import PreprocessError
from scgpt_batch.preprocessing.hvg import by_curve
np.seterr(all="ignore")
tiny = sp.csr_matrix(np.array([[1e-38, 0, 1e-38, 0], [0, 1e-38, 0, 1e-38]], np.float32))
try:
    by_curve(tiny, [tiny], 2, "seurat_v3")
except PreprocessError as exc:
    print(exc)
rng, fitted = np.random.default_rng(0), 0
for i in range(4000):
    n, g = rng.integers(1, 12), rng.integers(2, 60 if i % 2 else 12)
    values = 10.0 ** rng.choice([-45, -40, -38, -20, -10, 0, 3, 19, 30, 38], (n, g) if i % 3 == 0 else (1, 1))
    x = rng.integers(0, rng.integers(2, 30), (n, g)) * values
    x[:, rng.random(g) < rng.choice([0, 0.5, 0.9])] = 0
    x = np.minimum(x, 3e38).astype(np.float32)
    try:
        by_curve(sp.csr_matrix(x), [sp.csr_matrix(x)], int(rng.integers(1, g)), "seurat_v3")
        fitted += 1
    except (PreprocessError, ValueError):
        pass
print(fitted)
"""


def test_degenerate_counts_do_not_crash_the_process():
    # two cells × four genes of 1e-38 once did: their squares are 0 in float32
    done = subprocess.run([sys.executable, "-c", FUZZ], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, fitted = done.stdout.splitlines()
    assert refused.startswith("in a batch of 2 cells, 0 genes vary")
    assert 100 < int(fitted) < 3900


def test_genes_alone_come_with_the_cells_that_carry_them():
    adata = small()
    whole, genes = (prepared(adata, subset_hvg=10, min_cell_counts=1, genes_only=only) for only in (False, True))
    assert genes.var["n_cells"].tolist() == whole.X.getnnz(axis=0).tolist()


@pytest.mark.parametrize("case", ["seed", "raw_v3"])
def test_more_variable_genes_than_genes_keeps_all(case):
    adata = preprocess(cells_of(case), parameters_of(case, subset_hvg=10**6))
    assert adata.var_names.tolist() == preprocess(cells_of(case), parameters_of(case, subset_hvg=0)).var_names.tolist()


@pytest.mark.parametrize("flavor", ["cell_ranger", "seurat_v3", "seurat_v3_paper"])  # scanpy's seurat chooses here
@pytest.mark.parametrize("n_top", [40, 41])
def test_keeping_all_genes_needs_no_selection(flavor, n_top):
    adata = small(1)  # too few cells for any choice
    found = prepared(adata, subset_hvg=n_top, hvg_flavor=flavor)
    assert found.var_names.tolist() == adata.var_names.tolist()


@pytest.mark.parametrize("mode", ["static", "contextual"])
def test_requested_genes_survive_the_cut(mode):
    adata = small()
    cut = set(prepared(adata, subset_hvg=10).var_names)
    requested = [name for name in adata.var_names if name not in cut][:3]
    found = prepared(adata, subset_hvg=10, mode=mode, genes=[*requested, "unheard of"])
    assert set(found.var_names) == cut | set(requested)


def test_requested_genes_do_not_change_cell_vectors():
    cut = prepared(small(), subset_hvg=10).var_names.tolist()
    assert prepared(small(), subset_hvg=10, mode="cell", genes=["GENE0", "GENE1"]).var_names.tolist() == cut


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"result_normed_key": "n", "result_log1p_key": "l"}, ()),
        ({"result_normed_key": "n", "result_log1p_key": ""}, ()),
        ({"result_normed_key": "", "result_log1p_key": "l"}, ("normalize", "log1p")),
        ({"result_normed_key": "", "result_log1p_key": ""}, ("normalize", "log1p")),
        ({"normalize_total": 0, "result_log1p_key": ""}, ("log1p",)),
        ({"normalize_total": 0, "result_log1p_key": "l"}, ("log1p",)),
        ({"normalize_total": 0, "result_log1p_key": "l", "whole_numbers": True}, ()),
    ],
    ids=[
        "both named", "log replaces the named layer", "logs of X with normalised values", "both replace X",
        "log replaces X", "logs of X as it is", "logs of whole numbers",
    ],
)  # fmt: skip
def test_variable_genes_look_at_what_upstream_leaves_in_x(keys, steps):
    adata = small(n_vars=200)
    adata.X = adata.X.multiply(np.linspace(1, 30, adata.n_obs)[:, None]).tocsr()  # depths, so that normalising matters
    wanted = adata.copy()
    if "normalize" in steps:
        sc.pp.normalize_total(wanted, target_sum=50)
    if "log1p" in steps:
        sc.pp.log1p(wanted)
    sc.pp.highly_variable_genes(wanted, n_top_genes=20, flavor="cell_ranger", subset=True)
    parameters = {"normalize_total": 50, "log1p": True, "subset_hvg": 20} | keys
    found = prepared(adata, **parameters)
    assert found.var_names.tolist() == wanted.var_names.tolist()
    assert_close(found.X.toarray(), wanted.X.toarray(), rtol=1e-6)
    assert prepared(adata, genes_only=True, **parameters).var_names.tolist() == wanted.var_names.tolist()


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ({}, "X"),
        ({"normalize_total": 50}, "X_normed"),
        ({"normalize_total": 50, "result_normed_key": ""}, "X"),
        ({"normalize_total": 50, "log1p": True}, "X_log1p"),
        ({"normalize_total": 50, "log1p": True, "result_log1p_key": ""}, "X_normed"),
        ({"log1p": True}, "X_log1p"),
        ({"use_key": "counts"}, "counts"),
    ],
    ids=str,
)
def test_the_last_layer_is_binned(parameters, wanted):
    adata = small()
    adata.layers["counts"] = adata.X * 3
    found = prepared(adata, **parameters)
    layer = found.X if wanted == "X" else found.layers[wanted]
    assert_close(binned_layer(found, Parameters(**{"normalize_total": 0} | parameters)).toarray(), layer.toarray())


def test_result_key_x_is_a_layer_of_that_name():
    parameters = {"normalize_total": 50, "result_normed_key": "X"}
    found = prepared(small(), **parameters)
    assert_close(binned_layer(found, Parameters(**parameters)).sum(axis=1), np.full((60, 1), 50), rtol=1e-5)


def test_log_layer_leaves_the_normalised_one_alone():
    found = prepared(small(), normalize_total=50, log1p=True)
    assert_close(found.layers["X_log1p"].toarray(), np.log1p(found.layers["X_normed"].toarray()), rtol=1e-6)
    assert_close(found.layers["X_normed"].sum(axis=1), np.full((60, 1), 50), rtol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"filter_gene_by_counts": 10**6}, "no gene has 1000000 counts or more"),
        ({"min_cell_counts": 1e6}, r"no cell has 1e\+06 counts or more"),
        ({"use_key": "counts"}, "use_key 'counts' is not a layer of the row; its layers: none"),
        ({"subset_hvg": 10, "batch_key": "lane"}, "batch_key 'lane' is not a column of adata_obs.*'donor', .*'batch'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_error_names_what_cannot_be_preprocessed(parameters, message):
    with pytest.raises(PreprocessError, match=message):
        prepared(small(), **parameters)


@pytest.mark.parametrize("batch_key", ["", "cell_type"])
def test_too_few_points_for_seurat_v3_are_named(batch_key):
    adata = small(1)
    message = r"cannot select 10 variable genes \(seurat_v3\) .*in a batch of 1 cells, 0 genes vary"
    with pytest.raises(PreprocessError, match=message):
        prepared(adata, subset_hvg=10, hvg_flavor="seurat_v3", batch_key=batch_key)


def test_too_few_cells_for_variable_genes_are_named():
    with pytest.raises(
        PreprocessError, match=r"cannot select 10 variable genes \(cell_ranger\) from 1 cells × 40 genes"
    ):
        prepared(small(1), subset_hvg=10)


# Bins


def reference_bins(row: np.ndarray, n_bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Upstream's binning of one cell, as it is written there."""
    edges = np.quantile(row, np.linspace(0, 1, n_bins - 1)) if len(row) else np.zeros(n_bins - 1)
    high, low = np.digitize(row, edges), np.digitize(row, edges, right=True)
    return np.where(low == high, high, low + 1), high, edges


def ragged(*cells: list, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Values one after the other, and where each cell starts."""
    return np.concatenate([np.asarray(c, dtype) for c in cells]), np.cumsum([0, *map(len, cells)])


@pytest.mark.parametrize("n_bins", [2, 3, 51])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bins_equal_numpys_cell_by_cell(dtype, n_bins):
    rng = np.random.default_rng(5)
    lengths = [0, 1, 2, 49, 50, 51, 52, 400, 0]
    cells = [rng.gamma(1, 3, n).astype(dtype) for n in lengths]  # no ties
    cells += [rng.poisson(2, n).astype(dtype) + 1 for n in lengths]  # many
    cells += [np.log1p(rng.poisson(2, n) + 1).astype(dtype) for n in lengths] + [np.full(7, 0.1, dtype)]
    values, indptr = ragged(*cells, dtype=dtype)
    lower, upper, edges = bin_range(values, indptr, n_bins)
    for i, cell in enumerate(cells):
        part = slice(indptr[i], indptr[i + 1])
        for found, wanted in zip((lower[part], upper[part], edges[i]), reference_bins(cell, n_bins), strict=True):
            assert_close(found, wanted)


def test_bins_do_not_depend_on_the_block(monkeypatch):
    adata = small(30, 50)
    whole = bin_range(adata.X.data, adata.X.indptr)
    monkeypatch.setattr("scgpt_batch.preprocessing.binning.BLOCK", 60)
    for found, wanted in zip(bin_range(adata.X.data, adata.X.indptr), whole, strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("cells", [[[]], [[], []], []], ids=["one empty cell", "two", "no cell"])
def test_cells_without_values_have_no_bins(cells):
    lower, upper, edges = bin_range(*(ragged(*cells) if cells else (np.empty(0, np.float32), np.zeros(1, int))))
    assert len(lower) == len(upper) == 0
    assert_close(edges, np.zeros((len(cells), 50)))


def bin_table(adata: ad.AnnData, **parameters) -> pd.DataFrame:
    """Bins as a table cells × genes, to be compared by name."""
    x = adata.X
    hashes = gene_hash(adata.var_names.to_numpy())[x.indices]
    bins = bin_values(x.data, x.indptr, hashes, Parameters(**parameters), n_bins=51)
    return pd.DataFrame(sp.csr_matrix((bins, x.indices, x.indptr), x.shape).toarray(), adata.obs_names, adata.var_names)


def test_tie_break_selects_the_bin_of_ties():
    adata = small()
    lower, upper, _ = bin_range(adata.X.data, adata.X.indptr)
    for tie_break, wanted in (("lower", lower), ("upper", upper)):
        assert_close(bin_table(adata, tie_break=tie_break).to_numpy()[adata.X.nonzero()], wanted)
    drawn = bin_table(adata).to_numpy()[adata.X.nonzero()]
    assert (lower <= drawn).all() and (drawn <= upper).all()
    assert (lower < drawn).any() and (drawn < upper).any()


def test_ties_are_drawn_uniformly():
    adata = ad.AnnData(sp.csr_matrix(np.ones((1, 5000), np.float32)))
    counts = np.bincount(bin_table(adata).to_numpy().ravel().astype(int), minlength=51)
    assert counts[0] == 0
    assert ((counts[1:] - 100) ** 2 / 100).sum() < 86, "chi-squared with 49 degrees of freedom: beyond 1 in 1000"


def strangers(n_obs: int, seed: int) -> ad.AnnData:
    adata = small(n_obs, 30, seed=seed)
    adata.obs_names = [f"stranger {seed}.{i}" for i in range(n_obs)]
    return adata


ORDER = np.random.default_rng(1).permutation(30)
ELSEWHERE = {
    "genes permuted": lambda adata: adata[:, ORDER].copy(),
    "cells permuted": lambda adata: adata[ORDER[ORDER < 20]].copy(),
    "other cells beside": lambda adata: ad.concat([strangers(9, 8), adata, strangers(3, 9)]),
    "alone": lambda adata: adata[7].copy(),
    "without genes it lacks": lambda adata: adata[[3, 4], np.flatnonzero(adata.X[[3, 4]].sum(axis=0))].copy(),
    "in double precision": lambda adata: ad.AnnData(adata.X.astype(np.float64), obs=adata.obs, var=adata.var),
}


@pytest.mark.parametrize("move", ELSEWHERE.values(), ids=ELSEWHERE)
def test_bins_of_a_cell_do_not_depend_on_other_cells(move):
    wanted, found = bin_table(small(20, 30)), bin_table(move(small(20, 30)))
    cells = [cell for cell in wanted.index if cell in found.index]
    assert cells
    pd.testing.assert_frame_equal(found.loc[cells, :], wanted.loc[cells, found.columns])


def noise_of(adata: ad.AnnData, seed: int = 0, stream: int = 0) -> np.ndarray:
    hashes = gene_hash(adata.var_names.to_numpy())[adata.X.indices]
    return cell_noise(adata.X.data, adata.X.indptr, hashes, seed, stream=stream)


def test_bins_change_with_the_seed():
    adata = small(20, 30)
    first, *others = (bin_table(adata, seed=seed) for seed in (0, 1, 2**63 - 1))
    assert not any((first == other).all(axis=1).any() for other in others)


def test_every_draw_of_a_cell_changes_with_its_content():
    adata, other = random_adata(20, 30), random_adata(20, 30)
    other.X.data[0] += 1
    same = noise_of(adata) == noise_of(other)
    assert not same[: adata.X.indptr[1]].any()
    assert same[adata.X.indptr[1] :].all()


def test_every_draw_of_a_cell_changes_with_a_genes_name():
    adata, other = random_adata(1, 30), random_adata(1, 30)
    other.var_names = [f"{name}_2" if i == adata.X.indices[0] else name for i, name in enumerate(adata.var_names)]
    assert not (noise_of(adata) == noise_of(other)).any()


def test_noise_is_uniform_and_its_streams_differ():
    adata = random_adata(200, 150)
    first, second = noise_of(adata), noise_of(adata, stream=1)
    assert first.min() >= 0 and first.max() < 1
    assert len(np.unique(first)) == len(first)
    assert_close(np.histogram(first, 10, (0, 1))[0] / len(first), np.full(10, 0.1), atol=0.02)
    assert_close(np.corrcoef(first, second)[0, 1], 0, atol=0.03)


def test_gene_hashes_are_the_same_in_every_process():
    # a change here changes every random draw
    assert gene_hash(np.array(["CD3D", "β"])).tolist() == [12462208748712996712, 15427765383747918551]


# Tokens


def test_values_of_either_float_type_get_the_same_bins():
    x = random_adata(200, 300).X  # quarters: exact in both
    single, double = (bin_range(x.data.astype(dtype), x.indptr) for dtype in (np.float32, np.float64))
    for found, wanted in zip(single, double, strict=True):
        assert np.array_equal(found, wanted)


def test_tokens_start_with_cls_and_keep_the_order():
    matrix = sp.csr_matrix(np.array([[0, 3, 1], [0, 0, 0], [2, 0, 0]], np.float32))
    tokens, columns = tokenize(matrix, np.array([7, 5, 6]), cls_id=9, cls_value=-2)
    assert tokens.genes.tolist() == [9, 5, 6, 9, 9, 7]
    assert tokens.values.tolist() == [-2, 3, 1, -2, -2, 2]
    assert tokens.lengths.tolist() == [3, 1, 2]
    assert columns.tolist() == [-1, 1, 2, -1, -1, 0]


def kept_genes(adata: ad.AnnData, max_length: int, seed: int = 0) -> dict[str, set[str]]:
    """The genes that each cell keeps when it is sampled."""
    x = adata.X
    hashes = gene_hash(adata.var_names.to_numpy())[x.indices]
    keep = sample_long_cells(x.indptr, cell_noise(x.data, x.indptr, hashes, seed, stream=1), max_length)
    cells = np.repeat(np.arange(adata.n_obs), np.diff(x.indptr))
    return {name: set(adata.var_names[x.indices[keep & (cells == i)]]) for i, name in enumerate(adata.obs_names)}


def test_long_cells_keep_max_length_and_short_ones_all():
    adata = small(20, 30)
    lengths = np.diff(adata.X.indptr)
    kept = kept_genes(adata, max_length=10)
    assert lengths.min() < 9 < lengths.max()
    assert [len(genes) for genes in kept.values()] == np.minimum(lengths, 9).tolist()


def test_short_cells_are_not_sampled():
    indptr = np.array([0, 4, 4, 9])
    assert sample_long_cells(indptr, np.zeros(9), max_length=6) is None
    assert sample_long_cells(indptr, np.linspace(1, 0, 9), max_length=5).tolist() == [True] * 4 + [False] + [True] * 4


@pytest.mark.parametrize("move", ELSEWHERE.values(), ids=ELSEWHERE)
def test_sampling_of_a_cell_does_not_depend_on_other_cells(move):
    wanted, found = kept_genes(small(20, 30), 6), kept_genes(move(small(20, 30)), 6)
    cells = wanted.keys() & found.keys()
    assert cells and all(found[cell] == wanted[cell] for cell in cells)


def test_samples_change_with_the_seed():
    adata = random_adata(20, 300)
    first, second = (kept_genes(adata, 20, seed) for seed in (0, 1))
    assert all(first[cell] != second[cell] for cell in first)


# Warnings and labels


@pytest.mark.parametrize(
    ("values", "data_is_raw", "warning"),
    [
        ([1, 2, 31], False, "data_is_raw is false, but X looks like counts (values from 1 to 31)"),
        ([1, 2, 3], False, "data_is_raw is false, but X looks like counts (values from 1 to 3)"),
        ([0.5, 31], False, "data_is_raw is false, but X looks like counts (values from 0.5 to 31)"),
        ([0.5, 30], True, "data_is_raw is true, but X looks log-transformed (values from 0.5 to 30)"),
        ([0.5, 30], False, None),
        ([1, 2, 31], True, None),
        ([], False, None),
        ([], True, None),
    ],
)
def test_values_that_contradict_data_is_raw_are_a_warning(values, data_is_raw, warning):
    x = sp.csr_matrix((np.array(values, np.float32), np.arange(len(values)), [0, len(values)]), (1, 4))
    assert value_warning(ad.AnnData(x), data_is_raw=data_is_raw) == warning


def test_group_labels_are_strings():
    adata = small(4)
    assert group_labels(adata, "kept").tolist() == [str(v) for v in adata.obs["kept"]]


def test_a_group_column_that_is_missing_is_named():
    with pytest.raises(PayloadError, match="group_by 'lane' is not a column of adata_obs; its columns: 'donor', "):
        group_labels(small(4), "lane")
    with pytest.raises(PayloadError, match="group_by 'doner' is not a column of adata_obs: did you mean 'donor'"):
        group_labels(small(4), "doner")

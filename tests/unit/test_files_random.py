"""Random files, ingested and compared cell by cell with anndata's own reading.

SCGPT_RANDOM_FILES sets how many (default 15).
"""

import json
import os
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scgpt_batch.io import files
from scgpt_batch.io.files import ReadOptions
from scgpt_batch.io.rows import string_labels, table_to_json
from tests.file_layouts import LAYOUTS

FILES = int(os.environ.get("SCGPT_RANDOM_FILES", "15"))
PARTITION, BLOCK = 12, 60
COLUMN_NAMES = ["donor", "categories", "codes", "values", "mask", "index", "cell type", "été", "a'b\"c", "0", "x"]
LABELS = ["T cell", "B/NK", "", "nan", "1", "1.0", "naïve", "遺伝子", "a:b"]
TYPES = ["f2", "f4", "f8", ">f4", ">f8", ">i4", "i1", "i8", "u1", "u2", "u8", "?"]
names = st.text(st.characters(codec="utf-8", exclude_categories=["C"], exclude_characters="/"), min_size=1, max_size=8)


@st.composite
def columns(draw, n):
    """Columns of obs of every kind that anndata writes."""
    made = {}
    for name in draw(st.lists(st.sampled_from(COLUMN_NAMES), unique=True, max_size=4)):
        kind = draw(st.sampled_from(["category", "text", "int", "float", "bool", "nullable int", "nullable bool"]))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        holes = rng.random(n) < 0.3
        if kind == "category":
            made[name] = pd.Categorical(np.where(holes, None, rng.choice(LABELS, n)))
        elif kind == "text":
            made[name] = rng.choice(LABELS, n).astype(object)
        elif kind == "int":
            made[name] = rng.integers(-5, 5, n).astype(draw(st.sampled_from(["i1", "i4", "i8", "u1"])))
        elif kind == "float":
            made[name] = np.where(holes, np.nan, rng.normal(size=n)).astype(draw(st.sampled_from(["f4", "f8"])))
        elif kind == "bool":
            made[name] = holes
        else:
            values = pd.Series(rng.integers(0, 2, n)).astype("Int64" if kind == "nullable int" else "boolean")
            values[holes] = pd.NA
            made[name] = values.array
    return made


@st.composite
def random_files(draw):
    """Counts of any type, names and tables; how they are stored, and how they are cut into rows."""
    per_row = draw(st.integers(1, 9))
    edges = {1, per_row, per_row + 1, PARTITION, PARTITION + 1, 2 * PARTITION, 2 * PARTITION + per_row - 1}
    n, genes = draw(st.sampled_from(sorted(edges)) | st.integers(1, 40)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    dtype = np.dtype(draw(st.sampled_from(TYPES)))
    x = rng.poisson(2, (n, genes)) * (rng.random((n, genes)) < 0.5)
    x = (x / 4 if dtype.kind == "f" else x).astype(dtype)
    cell_names = draw(st.lists(names, min_size=n, max_size=n, unique=True))
    if draw(st.booleans()) and n > 2:
        cell_names[1] = cell_names[-1] = cell_names[0]
    gene_names = draw(st.lists(names, min_size=genes, max_size=genes))
    obs = pd.DataFrame(draw(columns(n)), index=pd.Index(cell_names, dtype=object))
    var = pd.DataFrame({"id": [f"E{i}" for i in range(genes)]}, index=pd.Index(gene_names, dtype=object))
    adata = ad.AnnData(x, obs=obs, var=var)
    options = {"cells_per_row": per_row, "layer": "X"}
    if len(obs.columns) and draw(st.booleans()):
        options["split_by"] = draw(st.sampled_from(list(obs)))
    return adata, draw(st.sampled_from(["dense", "csr", "csc"])), draw(st.sampled_from(["h5ad", "zarr"])), options


def stored(adata, layout):
    """The same with X stored in another layout; scipy has no sparse halves and no foreign byte order."""
    if layout == "dense":
        return adata
    made = adata.copy()
    x = made.X.astype(np.float32) if made.X.dtype == np.float16 else made.X.astype(made.X.dtype.newbyteorder("="))
    made.X = sp.csr_matrix(x) if layout == "csr" else sp.csc_matrix(x)
    return made


def lines_of(adata):
    """Each cell's values and its line of obs, as a row spells them."""
    split = json.loads(table_to_json(adata.obs))
    x = adata.X.toarray() if sp.issparse(adata.X) else np.asarray(adata.X)
    return {
        name: (line, values.astype(np.float32).tolist())
        for name, line, values in zip(split["index"], split["data"], x, strict=True)
    }, split["columns"]


def compare(path, adata_as_read, options):
    """Every cell once, in its group, with the values that anndata reads."""
    adata_as_read.obs_names_make_unique()
    wanted, wanted_columns = lines_of(adata_as_read)
    options = ReadOptions(**options)
    rows = [row for task in files.plan([str(path)], options) for row in files.read(task, options)]
    found = {}
    for row in rows:
        obs, var = json.loads(row["adata_obs"]), json.loads(row["adata_var"])
        x = sp.csr_matrix((row["x_data"], row["x_indices"], row["x_indptr"]), (row["n_obs"], row["n_vars"])).toarray()
        assert var["index"] == adata_as_read.var_names.tolist() and obs["columns"] == wanted_columns
        assert row["n_obs"] == len(obs["index"]) <= options.cells_per_row
        for name, line, values in zip(obs["index"], obs["data"], x, strict=True):
            assert name not in found, f"cell {name!r} is in two rows"
            found[name] = (line, values.tolist())
        if options.split_by:
            labels = string_labels(adata_as_read.obs[options.split_by])[
                adata_as_read.obs_names.get_indexer(obs["index"])
            ]
            assert row["adata_id"].rpartition(":")[0] == f"f:{labels[0]}" and len(set(labels)) == 1
    assert found == wanted


@settings(max_examples=FILES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(file=random_files())
def test_random_files_give_what_anndata_reads(file, tmp_path_factory):
    adata, layout, suffix, options = file
    folder = tmp_path_factory.mktemp("random")
    path = folder / f"f.{suffix}"
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(files, "PARTITION_CELLS", PARTITION)
        patch.setattr(files, "CSC_PARTITION_VALUES", BLOCK)
        patch.setattr(files, "CSC_BLOCK_VALUES", BLOCK // 2)
        patch.setattr(files, "NAMES_BLOCK", 7)
        made = stored(adata, layout)
        write = made.write_h5ad if suffix == "h5ad" else made.write_zarr
        write(path, convert_strings_to_categoricals=False)
        compare(path, ad.read_h5ad(path) if suffix == "h5ad" else ad.read_zarr(path), options)


@settings(max_examples=max(1, FILES // 3), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(file=random_files(), layout=st.sampled_from([name for name in LAYOUTS if name != "anndata_now"]))
def test_random_files_of_old_layouts_round_trip(file, layout, tmp_path_factory):
    """anndata itself does not read some of them."""
    adata, _, _, options = file
    adata = adata.copy()
    adata.X = sp.csr_matrix(adata.X.astype(np.float32))
    adata.obs = adata.obs[[name for name in adata.obs if not pd.api.types.is_extension_array_dtype(adata.obs[name])
                           or isinstance(adata.obs[name].dtype, pd.CategoricalDtype)]]  # fmt: skip
    if layout in ("anndata_0_6", "rhdf5"):  # fixed-length bytes
        adata.obs = adata.obs.select_dtypes(exclude=["object", "category"])
        adata.obs_names = [f"c{i}" for i in range(adata.n_obs)]
        adata.var_names = [f"g{i}" for i in range(adata.n_vars)]
    if layout == "anndata_0_6":
        adata.obs = adata.obs.drop(columns="index", errors="ignore")
    if layout == "seurat_disk":  # without the attribute that orders them
        adata.obs = adata.obs[sorted(adata.obs)]
    if options.get("split_by") not in adata.obs:
        options = {name: value for name, value in options.items() if name != "split_by"}
    path = tmp_path_factory.mktemp("old") / "f.h5ad"
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(files, "PARTITION_CELLS", PARTITION)
        LAYOUTS[layout](adata, path)
        compare(path, adata, options)

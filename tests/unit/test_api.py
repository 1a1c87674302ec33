"""`sb.embed` and its neighbours: AnnData in, vectors in obsm, varm or a table, with the numbers of the batch job."""

import inspect
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scgpt_batch as sb
from scgpt_batch import api
from scgpt_batch.errors import ConfigError, EmbeddingWarning, LowCoverage, PayloadError
from scgpt_batch.inference.engine import load_embedder
from scgpt_batch.io.rows import to_row
from tests.helpers import assert_close

DATA = Path(sb.__file__).parent.parent / "tests" / "data"
CHECKPOINT = DATA / "golden" / "checkpoint_flash"
COUNTS = {"data_is_raw": True, "log1p": True, "hvg_flavor": "seurat_v3", "subset_hvg": 300}
AS_EMBED_DATA = {"need_preprocess": False, "data_is_raw": True}

pytestmark = pytest.mark.filterwarnings("error::scgpt_batch.errors.EmbeddingWarning")


def golden(name):
    with np.load(DATA / "golden" / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model():
    return sb.load_model(CHECKPOINT)


@pytest.fixture(scope="module")
def raw(pbmc3k):
    return pbmc3k[golden("embed_data")["cell_index"]].copy()


@pytest.fixture
def adata(raw):
    return raw.copy()


def job_results(adata, **parameters):
    """What the batch job computes for the AnnData cut into rows of one sample."""
    step = api.BLOCK_CELLS
    parts = [adata[i : i + step] for i in range(0, adata.n_obs, step)]
    rows = [to_row(part) | {"sample_id": "s"} for part in parts]
    results = list(load_embedder(CHECKPOINT).embed_rows(rows, sb.Parameters(**parameters)))
    assert all(result.error is None for result in results)
    return results


# Numbers


def test_cell_vectors_equal_embed_data(adata, model):
    assert sb.embed(adata, model, tie_break="upper", **AS_EMBED_DATA) is None
    assert_close(adata.obsm["X_scGPT"], golden("embed_data")["x_1200_upper"], atol=1e-5)


def test_static_vectors_equal_upstream(adata, model):
    sb.embed(adata, model, "static", **AS_EMBED_DATA)
    ids = model.embedder.vocabulary.ids(adata.var_names)
    assert np.array_equal(adata.var["X_scGPT_known"], ids >= 0)
    assert_close(adata.varm["X_scGPT"][ids >= 0], golden("static")["embeddings"][ids[ids >= 0]], atol=1e-5)
    assert np.isnan(adata.varm["X_scGPT"][ids < 0]).all()


@pytest.mark.parametrize("cells", [1_000, 70])
def test_cell_vectors_equal_the_job(adata, model, monkeypatch, cells):
    monkeypatch.setattr(api, "BLOCK_CELLS", cells)
    sb.embed(adata, model, **COUNTS)
    wanted = np.concatenate([result.cell_embeddings for result in job_results(adata, mode="cell", **COUNTS)])
    assert_close(adata.obsm["X_scGPT"], wanted, atol=1e-6)


@pytest.mark.parametrize("cells", [1_000, 70])
def test_static_genes_equal_the_job(adata, model, monkeypatch, cells):
    monkeypatch.setattr(api, "BLOCK_CELLS", cells)
    sb.embed(adata, model, "static", **COUNTS)
    result = job_results(adata, mode="static", **COUNTS)[0]
    found = adata.var_names[~np.isnan(adata.varm["X_scGPT"]).any(axis=1)]
    assert set(found) == set(result.genes)
    at = adata.var_names.get_indexer(result.genes)
    assert_close(adata.varm["X_scGPT"][at], result.gene_embeddings, atol=1e-6)


@pytest.mark.parametrize("cells", [1_000, 70])
def test_contextual_means_equal_the_job(adata, model, monkeypatch, cells):
    (whole,) = job_results(adata, mode="contextual", **COUNTS)
    monkeypatch.setattr(api, "BLOCK_CELLS", cells)
    sb.embed(adata, model, "contextual", **COUNTS)
    at = adata.var_names.get_indexer(whole.genes)
    assert_close(adata.varm["X_scGPT"][at], whole.gene_embeddings, atol=1e-5)


@pytest.mark.parametrize("cells", [1_000, 70])
def test_group_means_come_as_a_table(adata, model, monkeypatch, cells):
    adata.obs["half"] = np.where(np.arange(adata.n_obs) % 2, "odd", "even")
    (whole,) = job_results(adata, mode="contextual", group_by="half", **COUNTS)
    monkeypatch.setattr(api, "BLOCK_CELLS", cells)
    table = sb.embed(adata, model, "contextual", group_by="half", **COUNTS)
    assert table.columns.tolist() == ["group", "gene", "n_cells", "embedding"]
    wanted = pd.DataFrame({"group": whole.groups, "gene": whole.genes, "n_cells": whole.n_cells})
    wanted["embedding"] = list(whole.gene_embeddings)
    wanted = wanted.sort_values(["group", "gene"], ignore_index=True)
    pd.testing.assert_frame_equal(table.drop(columns="embedding"), wanted.drop(columns="embedding"))
    assert_close(np.stack(table["embedding"]), np.stack(wanted["embedding"]), atol=1e-5)
    assert not adata.varm


# What comes back


def test_a_copy_leaves_the_original_alone(adata, model):
    found = sb.embed(adata, model, copy=True, key_added="emb", **AS_EMBED_DATA)
    assert found.obsm["emb"].shape == (adata.n_obs, 64)
    assert "emb" not in adata.obsm and "scgpt" not in adata.uns


def test_uns_records_the_model_and_survives_h5ad(adata, model, tmp_path):
    sb.embed(adata, model, genes=["CD3D"], mode="contextual", **COUNTS)
    adata.write_h5ad(tmp_path / "x.h5ad")
    record = ad.read_h5ad(tmp_path / "x.h5ad").uns["scgpt"]
    assert record["model"] == "checkpoint_flash" and record["digest"] == model.digest
    assert record["version"] == model.digest[:12] and record["mode"] == "contextual"
    assert record["parameters"]["subset_hvg"] == 300 and list(record["parameters"]["genes"]) == ["CD3D"]
    assert 0.2 < record["coverage"] <= 1 and list(record["warnings"]) == []


def test_coverage_is_that_of_all_cells(adata, model, monkeypatch):
    (whole,) = job_results(adata, mode="cell", **AS_EMBED_DATA)
    monkeypatch.setattr(api, "BLOCK_CELLS", 70)
    sb.embed(adata, model, **AS_EMBED_DATA)
    assert_close(adata.uns["scgpt"]["coverage"], whole.report.coverage, atol=1e-12)


def test_cells_below_the_cell_filter_are_nan(adata, model):
    adata.X = sp.csr_matrix(adata.X.multiply((np.arange(adata.n_obs) != 7).astype(np.float32)[:, None]))
    sb.embed(adata, model, filter_cell_by_counts=True, **COUNTS)
    missing = np.isnan(adata.obsm["X_scGPT"]).any(axis=1)
    assert np.flatnonzero(missing).tolist() == [7]


def test_repeated_cell_names_keep_their_own_vectors(adata, model):
    unique = sb.embed(adata, model, copy=True, **AS_EMBED_DATA).obsm["X_scGPT"]
    adata.obs_names = ["same"] * adata.n_obs
    sb.embed(adata, model, **AS_EMBED_DATA)
    assert np.array_equal(adata.obsm["X_scGPT"], unique)


def test_ensembl_ids_get_the_vectors_of_their_symbols(adata, model):
    wanted = sb.embed(adata, model, "static", copy=True, **AS_EMBED_DATA).varm["X_scGPT"]
    adata.var["gene_symbol"] = adata.var_names
    adata.var_names = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    with pytest.warns(EmbeddingWarning, match="gene names taken from var column 'gene_symbol'"):
        sb.embed(adata, model, "static", **AS_EMBED_DATA)
    assert np.array_equal(adata.varm["X_scGPT"], wanted, equal_nan=True)


def test_a_backed_file_gives_the_same_vectors(adata, model, monkeypatch, tmp_path):
    monkeypatch.setattr(api, "BLOCK_CELLS", 70)
    wanted = sb.embed(adata, model, copy=True, **COUNTS).obsm["X_scGPT"]
    for name, x in (("sparse", adata.X), ("dense", adata.X.toarray()), ("by_gene", sp.csc_matrix(adata.X))):
        ad.AnnData(x, obs=adata.obs, var=adata.var).write_h5ad(tmp_path / f"{name}.h5ad")
        backed = ad.read_h5ad(tmp_path / f"{name}.h5ad", backed="r")
        sb.embed(backed, model, **COUNTS)
        assert np.array_equal(backed.obsm["X_scGPT"], wanted)
        backed.file.close()


def test_a_layer_or_raw_is_embedded_instead_of_x(adata, model):
    wanted = sb.embed(adata, model, copy=True, **AS_EMBED_DATA).obsm["X_scGPT"]
    adata.layers["counts"] = adata.X.copy()
    adata.raw = adata.copy()
    adata = adata[:, ::2].copy()
    adata.X = adata.X.toarray() - 1.0
    sb.embed(adata, model, layer="raw", **AS_EMBED_DATA)
    assert np.array_equal(adata.obsm["X_scGPT"], wanted)
    sb.embed(adata, model, "static", layer="raw", key_added="raw", **AS_EMBED_DATA)
    sb.embed(adata, model, "static", layer="counts", key_added="half", **AS_EMBED_DATA)
    known = adata.var["half_known"]
    assert np.array_equal(adata.varm["raw"][known], adata.varm["half"][known])


# What is wrong, and where


def test_scaled_values_name_the_matrices_to_take(adata, model):
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.toarray() - 1.0
    with pytest.raises(PayloadError, match=r"adata.X contains negative values .*layer='counts'"):
        sb.embed(adata, model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "cuonts"}, "layer 'cuonts' is not in the AnnData: did you mean 'counts'"),
        ({"batch_key": "donor"}, "batch_key 'donor' is not a column of adata.obs; its columns: .*'n'"),
        ({"mode": "contextual", "group_by": "x"}, "group_by 'x' is not a column of adata.obs"),
        ({"use_key": "counts"}, "takes no 'use_key'"),
        ({"subset_hgv": 3}, "subset_hgv"),
        ({"mode": "contextul"}, "mode"),
    ],
)
def test_wrong_arguments_are_named(adata, model, arguments, message):
    adata.layers["counts"] = adata.X
    adata.obs["n"] = 1
    with pytest.raises(ConfigError, match=message):
        sb.embed(adata, model, **arguments)


def test_unknown_genes_are_low_coverage(adata, model):
    adata.var = pd.DataFrame(index=[f"unknown {i}" for i in range(adata.n_vars)])
    with pytest.raises(LowCoverage, match=r"adata\.X: 0 of 32738 gene names"):
        sb.embed(adata, model)


def test_a_warning_of_many_blocks_is_given_once(adata, model, monkeypatch):
    monkeypatch.setattr(api, "BLOCK_CELLS", 70)
    with pytest.warns(EmbeddingWarning, match="looks like counts") as caught:
        sb.embed(adata, model, need_preprocess=False)
    assert len(caught) == 1 and list(adata.uns["scgpt"]["warnings"]) == [str(caught[0].message)]


def test_a_missing_model_is_named():
    with pytest.raises(ConfigError, match="no model at 'nowhere': give a checkpoint folder"):
        sb.load_model("nowhere")


# The model by itself


def test_gene_embeddings_are_rows_of_the_static_table(model):
    table = sb.gene_embeddings(model, ["CD3D", "MS4A1"])
    assert table.index.tolist() == ["CD3D", "MS4A1"]
    assert_close(table, golden("static")["embeddings"][model.embedder.vocabulary.ids(table.index)], atol=1e-5)
    assert len(sb.gene_embeddings(model)) == len(model.embedder.vocabulary) - 3


def test_unknown_genes_are_named_and_left_out(model):
    with pytest.warns(EmbeddingWarning, match="1 genes are not in the model's vocabulary: NOPE"):
        assert sb.gene_embeddings(model, ["NOPE", "CD3D"]).index.tolist() == ["CD3D"]
    with pytest.raises(ConfigError, match=r"none of the 1 genes .*'cd3d': did you mean 'CD3D'"):
        sb.gene_embeddings(model, ["cd3d"])


# The package's front door


def test_all_is_sorted_and_importable():
    assert sb.__all__ == sorted(sb.__all__)
    for name in sb.__all__:
        assert getattr(sb, name) is not None
        assert name in dir(sb)
    with pytest.raises(AttributeError, match="no attribute 'emebd'"):
        sb.emebd  # noqa: B018


def test_public_functions_have_examples():
    for name in ("embed", "gene_embeddings", "load_model"):
        assert "Examples\n" in inspect.getdoc(getattr(sb, name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inspect.signature(sb.embed)

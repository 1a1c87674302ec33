"""Embedding tables read without Spark: the newest model's vectors, in AnnData, pandas, polars or Arrow."""

from datetime import UTC, datetime, timedelta

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from deltalake import write_deltalake

import scgpt_batch as sb
from scgpt_batch.embedding_tables import nearest
from scgpt_batch.errors import ConfigError, EmbeddingWarning
from tests.helpers import random_adata

START = datetime(2026, 1, 1, tzinfo=UTC)
D = 4


def lines(
    names, *, kind="cell_id", seed=0, adata_id="donor1:0-3", hours=0, mode="cell", version="1", run="r", group=""
):
    """Lines of an embedding table, one for each name."""
    vectors = np.random.default_rng(seed).standard_normal((len(names), D)).astype(np.float32)
    n = len(names)
    columns = {"adata_id": [adata_id] * n, kind: names, "embedding": pa.array(list(vectors), pa.list_(pa.float32()))}
    if kind == "gene":
        columns |= {"group": [group] * n, "n_cells": pa.array([3] * n, pa.int32())}
    at = START + timedelta(hours=hours)
    stamps = {"mode": mode, "model_name": "scgpt", "model_version": version, "params_hash": "p", "content_hash": "c",
              "run_id": run}  # fmt: skip
    columns |= {name: [value] * n for name, value in stamps.items()}
    columns["embedded_at"] = pa.array([at] * n, pa.timestamp("us", "UTC"))
    return pa.table(columns)


def vectors_of(table):
    return np.stack(table["embedding"].to_pylist()).astype(np.float32)


@pytest.fixture
def write(tmp_path):
    def write(*tables):
        write_deltalake(str(tmp_path / "t"), pa.concat_tables(tables))
        return str(tmp_path / "t")

    return write


def test_cells_come_to_their_names(write):
    stored = lines(["c2", "c0", "c1"])
    adata = random_adata(3, 5)
    adata.obs_names = ["c0", "c1", "c2"]
    found = sb.read_embeddings(write(stored), adata=adata)
    assert found is adata
    assert np.array_equal(adata.obsm["X_scGPT"], vectors_of(stored)[[1, 2, 0]])
    assert adata.uns["scgpt"]["version"] == "1" and adata.uns["scgpt"]["mode"] == "cell"


def test_a_cell_without_a_vector_is_nan_and_counted(write):
    adata = random_adata(3, 5)
    adata.obs_names = ["c0", "c1", "new"]
    with pytest.warns(EmbeddingWarning, match="1 of 3 cells have no vector"):
        sb.read_embeddings(f"delta.`{write(lines(['c0', 'c1']))}`", adata=adata)
    assert np.isnan(adata.obsm["X_scGPT"]).any(axis=1).tolist() == [False, False, True]


def test_a_table_of_other_cells_is_an_error(write):
    adata = random_adata(2, 5)
    adata.obs_names = ["x", "y"]
    with pytest.raises(ConfigError, match=r"none of the AnnData's 2 cells \(first: 'x'\)"):
        sb.read_embeddings(write(lines(["c0"])), adata=adata)


def test_a_cell_name_in_two_rows_is_an_error_for_an_anndata(write):
    path = write(lines(["c0", "c1"]), lines(["c1"], adata_id="donor2:0-1"))
    adata = random_adata(2, 5)
    adata.obs_names = ["c0", "c1"]
    with pytest.raises(ConfigError, match=r"several cells named 'c1' \(rows donor1:0-3, donor2:0-1\)"):
        sb.read_embeddings(path, adata=adata)
    assert sorted(sb.read_embeddings(path).obs_names) == ["donor1:0-3:c0", "donor1:0-3:c1", "donor2:0-1:c1"]


def test_repeated_names_are_found_as_ingest_named_them(write):
    stored = lines(["c", "c-1"])
    adata = random_adata(2, 5)
    adata.obs_names = ["c", "c"]
    sb.read_embeddings(write(stored), adata=adata)
    assert np.array_equal(adata.obsm["X_scGPT"], vectors_of(stored))


def test_the_model_that_wrote_last_is_read(write):
    old, new = lines(["c0", "c1"], seed=1), lines(["c0", "c1"], seed=2, hours=1, version="2", run="s")
    path = write(new, old)
    assert np.array_equal(sb.read_embeddings(path).obsm["X_scGPT"], vectors_of(new))
    assert np.array_equal(sb.read_embeddings(path, model_version="1").obsm["X_scGPT"], vectors_of(old))
    assert np.array_equal(sb.read_embeddings(path, run_id="r").obsm["X_scGPT"], vectors_of(old))


def test_versions_are_never_mixed(write):
    path = write(lines(["c0", "c1"], seed=1), lines(["c0"], seed=2, hours=1, version="2"))
    with pytest.warns(EmbeddingWarning, match="1 vectors exist only of an older model"):
        found = sb.read_embeddings(path)
    assert found.obs_names.tolist() == ["c0"] and found.uns["scgpt"]["version"] == "2"


def test_static_genes_come_once_and_to_their_names(write):
    one = lines(["A", "B"], kind="gene", mode="static")
    path = write(one, lines(["A", "B"], kind="gene", mode="static", adata_id="donor2:0-9"))
    adata = ad.AnnData(np.ones((2, 3), np.float32), var=pd.DataFrame(index=["B", "unknown", "A"]))
    sb.read_embeddings(path, adata=adata)
    assert np.array_equal(adata.varm["X_scGPT"][[2, 0]], vectors_of(one))
    assert np.isnan(adata.varm["X_scGPT"][1]).all()
    assert sb.read_embeddings(path).var_names.tolist() == ["A", "B"]


def test_contextual_vectors_of_two_samples_are_an_error_for_an_anndata(write):
    path = write(
        lines(["A"], kind="gene", mode="contextual", group="T"), lines(["A"], kind="gene", mode="contextual", group="B")
    )
    with pytest.raises(ConfigError, match=r"2 contextual vectors of A \(donor1:0-3/[TB], donor1:0-3/[TB]\)"):
        sb.read_embeddings(path)
    assert len(sb.read_embeddings(path, to="pandas")) == 2


def test_two_modes_are_an_error_for_an_anndata(write):
    path = write(lines(["A"], kind="gene", mode="contextual"), lines(["A"], kind="gene", mode="static"))
    with pytest.raises(ConfigError, match="the modes 'contextual', 'static': give mode"):
        sb.read_embeddings(path)
    assert sb.read_embeddings(path, mode="static").n_vars == 1
    assert sorted(sb.read_embeddings(path, to="arrow")["mode"].to_pylist()) == ["contextual", "static"]


def test_every_form_holds_the_same_lines(write):
    stored = lines(["c0", "c1"])
    path = write(stored)
    frame = sb.read_embeddings(path, to="pandas")
    assert np.array_equal(np.stack(frame["embedding"]), vectors_of(stored))
    assert sb.read_embeddings(path, to="arrow").num_rows == 2
    assert sb.read_embeddings(path, to="polars").columns == frame.columns.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "static"}, "has no embeddings of mode 'static'"),
        ({"model_version": "9"}, "has no embeddings of model_version '9'"),
        ({"to": "numpy"}, "to 'numpy' must be one of 'anndata', 'pandas', "),
    ],
)
def test_wrong_arguments_of_a_reading_are_named(write, arguments, message):
    with pytest.raises(ConfigError, match=message):
        sb.read_embeddings(write(lines(["c0"])), **arguments)


def test_places_without_a_table_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no Delta table at"):
        sb.read_embeddings(f"delta.`{tmp_path / 'nowhere'}`")
    write_deltalake(str(tmp_path / "other"), pa.table({"a": [1]}))
    with pytest.raises(ConfigError, match="is not an embedding table: it lacks the columns adata_id"):
        sb.read_embeddings(str(tmp_path / "other"))


def test_a_name_without_a_spark_session_is_an_error(monkeypatch):
    monkeypatch.setattr("pyspark.sql.SparkSession.getActiveSession", lambda: None)
    with pytest.raises(ConfigError, match=r"'main\.lab\.cells' is a table's name"):
        sb.read_embeddings("main.lab.cells")
    with pytest.raises(ConfigError, match=r"'main\.lab\.genes' is a table's name"):
        sb.similar_genes("main.lab.genes", "CD3D")


def test_a_folder_named_like_a_table_is_a_model(tmp_path, monkeypatch):
    (tmp_path / "human.v2").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="the checkpoint folder has no"):
        sb.similar_genes("human.v2", "CD3D")


def test_nearest_genes_are_those_of_largest_cosine():
    vectors = np.array([[1, 0], [2, 0.1], [0, 1], [-1, 0]], np.float32)
    found = nearest(pd.Index(["A", "B", "C", "D"]), vectors, ["A", "C"], 2)
    assert found["gene"].tolist() == ["A", "A", "C", "C"] and found["rank"].tolist() == [1, 2, 1, 2]
    assert found["neighbour"].tolist() == ["B", "C", "B", "A"]
    assert np.allclose(found["similarity"], [2 / np.hypot(2, 0.1), 0, 0.1 / np.hypot(2, 0.1), 0])
    assert len(nearest(pd.Index(["A", "B"]), vectors[:2], ["A"], 10)) == 1


def test_similar_genes_of_a_table_and_of_its_model_agree(write, golden):
    model = golden / "checkpoint_flash"
    vectors = sb.gene_embeddings(model)
    stored = lines(vectors.index[:50].tolist(), kind="gene", mode="static")
    column = pa.array(list(vectors.to_numpy()[:50]), pa.list_(pa.float32()))
    stored = stored.set_column(stored.column_names.index("embedding"), "embedding", column)
    gene = vectors.index[3]
    of_table = sb.similar_genes(write(stored), gene, 5)
    wanted = nearest(vectors.index[:50], vectors.to_numpy()[:50], [gene], 5)
    pd.testing.assert_frame_equal(of_table, wanted)
    assert sb.similar_genes(model, [gene], 3)["gene"].tolist() == [gene] * 3
    with pytest.raises(ConfigError, match="no static vector for NOPE"):
        sb.similar_genes(model, "NOPE")

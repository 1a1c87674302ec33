"""`export`: the vectors of a table in an AnnData file or in Parquet, without Spark."""

import anndata as ad
import numpy as np
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from scgpt_batch.cli.main import OK, WRONG_USAGE
from tests.helpers import random_adata
from tests.unit.test_embedding_tables import lines, vectors_of

STORED = lines(["c2", "c0", "c1"])


@pytest.fixture
def table(tmp_path):
    write_deltalake(str(tmp_path / "t"), STORED)
    return f"delta.`{tmp_path / 't'}`"


@pytest.fixture
def file(tmp_path):
    adata = random_adata(3, 5)
    adata.obs_names = ["c0", "c1", "c2"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_cells_of_a_file_get_their_vectors(run, table, file, tmp_path, suffix):
    out = tmp_path / f"embedded{suffix}"
    code, result, _ = run("export", "--embeddings", table, "--h5ad", file, "--out", out)
    assert (code, result) == (OK, {"out": str(out), "cells": 3, "genes": 0})
    adata = ad.read_zarr(out) if suffix == ".zarr" else ad.read_h5ad(out)
    assert np.array_equal(adata.obsm["X_scGPT"], vectors_of(STORED)[[1, 2, 0]])
    assert adata.shape == (3, 5)


def test_without_a_file_the_cells_of_the_table_are_written(run, table, tmp_path):
    assert run("export", "--embeddings", table, "--out", tmp_path / "new.h5ad", "--key-added", "emb")[0] == OK
    adata = ad.read_h5ad(tmp_path / "new.h5ad")
    assert adata.obs_names.tolist() == ["c2", "c0", "c1"]
    assert np.array_equal(adata.obsm["emb"], vectors_of(STORED))


def test_parquet_holds_the_lines_of_the_table(run, table, tmp_path):
    code, result, _ = run("export", "--embeddings", table, "--out", tmp_path / "x" / "out.parquet")
    assert code == OK and result["cells"] == 3
    assert pq.read_table(tmp_path / "x" / "out.parquet").equals(STORED.select(pq.read_schema(result["out"]).names))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.csv"], "out 'x.csv' must end in .h5ad, .zarr or .parquet"),
        (["--out", "x.parquet", "--h5ad", "y.h5ad"], "Parquet holds the lines of the table alone"),
        (["--out", "x.h5ad", "--h5ad", "missing.h5ad"], "cannot read missing.h5ad"),
        (["--out", "x.h5ad", "--model-version", "9"], "no embeddings of model_version '9'"),
    ],
)
def test_wrong_usage_writes_nothing(run, table, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, _, err = run("export", "--embeddings", table, *arguments)
    assert code == WRONG_USAGE and message in err
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_file_is_not_overwritten(run, table, file):
    before = file.read_bytes()
    code, _, err = run("export", "--embeddings", table, "--out", file)
    assert code == WRONG_USAGE and f"{file} exists" in err
    assert file.read_bytes() == before

"""Every layout of obs and var gives each cell its own names and values, whichever cells a task reads."""

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from scgpt_batch.errors import ScgptBatchError
from scgpt_batch.io import files
from scgpt_batch.io.files import ReadOptions
from scgpt_batch.io.rows import from_row
from tests.file_layouts import LAYOUTS
from tests.helpers import random_adata


def read_all(path, **options):
    options = ReadOptions(**options)
    return [row for task in files.plan([str(path)], options) for row in files.read(task, options)]


def assert_cells(rows, adata):
    found = [from_row(row) for row in rows]
    assert sorted(name for part in found for name in part.obs_names) == sorted(adata.obs_names)
    for part in found:
        wanted = adata[part.obs_names]
        assert part.var_names.tolist() == adata.var_names.tolist()
        assert abs(part.X - wanted.X).max() == 0
        assert set(part.obs) == set(adata.obs)
        for name in part.obs:
            ours, theirs = part.obs[name], wanted.obs[name]
            assert ((ours.astype(str) == theirs.astype(str)) | (ours.isna() & theirs.isna())).all(), name
        assert part.var.astype(str).equals(adata.var.astype(str))


def labelled():
    adata = random_adata(60, 11)
    adata.obs.loc[adata.obs_names[::7], "cell_type"] = np.nan
    adata.var["biotype"] = pd.Categorical(["coding", "lncRNA"] * 5 + ["coding"])
    adata.var["gene_ids"] = [f"ENSG{i:011d}" for i in range(11)]
    return adata


@pytest.mark.parametrize("options", [{}, {"cells_per_row": 7}, {"cells_per_row": 7, "split_by": "cell_type"}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cells_keep_their_names_and_values_in_every_layout(tmp_path, monkeypatch, layout, options):
    monkeypatch.setattr(files, "PARTITION_CELLS", 20)
    adata = labelled()
    LAYOUTS[layout](adata, tmp_path / "f.h5ad")
    assert_cells(read_all(tmp_path / "f.h5ad", **options), adata)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_are_named_by_their_label_in_every_layout(tmp_path, layout):
    adata = random_adata(30, 5)
    LAYOUTS[layout](adata, tmp_path / "f.h5ad")
    names = {row["adata_id"].split(":")[1] for row in read_all(tmp_path / "f.h5ad", split_by="cell_type")}
    assert names == set(adata.obs["cell_type"])


def test_nullable_columns_keep_their_missing_values(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PARTITION_CELLS", 4)
    adata = random_adata(12, 3)
    adata.obs["i"] = pd.array([None, 1, 2] * 4, dtype="Int64")
    adata.obs["b"] = pd.array([True, None, False] * 4, dtype="boolean")
    adata.obs["s"] = pd.array(["x", None, "z"] * 4, dtype="string")
    with ad.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(tmp_path / "f.h5ad")
    obs = pd.concat([from_row(row).obs for row in read_all(tmp_path / "f.h5ad", cells_per_row=4)])
    assert obs["i"].isna().tolist() == [True, False, False] * 4
    assert obs["b"].tolist() == [True, None, False] * 4
    assert obs["s"].tolist() == ["x", None, "z"] * 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file["obs"].move("donor", "lost"), "column 'donor'"),
        (lambda file: replace(file, "obs/n_genes", np.arange(11)), "n_genes.*11 values for 12"),
        (lambda file: replace(file, "obs/cell_type/codes", np.full(12, 9, "i1")), "code 9 is out of range"),
        (lambda file: replace(file, "obs/_index", np.arange(13)), "12 cells, not 13"),
        (lambda file: replace(file, "var/_index", np.arange(4)), "var has 4 genes"),
    ],
    ids=["column missing", "short column", "code without category", "too many names", "too few genes"],
)
def test_inconsistent_tables_are_an_error(tmp_path, damage, message):
    random_adata(12, 3).write_h5ad(tmp_path / "bad.h5ad")
    with h5py.File(tmp_path / "bad.h5ad", "r+") as file:
        damage(file)
    with pytest.raises(ScgptBatchError, match=f"bad.h5ad.*{message}"):
        read_all(tmp_path / "bad.h5ad")


def replace(file, name, values):
    attributes = dict(file[name].attrs)
    del file[name]
    file[name] = values
    file[name].attrs.update(attributes)

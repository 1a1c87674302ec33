"""Files as a Spark source: `spark.read.format("anndata")`."""

import json
import subprocess
import sys
import textwrap

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from pyspark.sql import functions as F

from scgpt_batch.io import files
from scgpt_batch.io.files import ReadOptions, Slice
from scgpt_batch.io.rows import from_row
from scgpt_batch.spark.datasource import ROWS_DDL, AnnDataReader, register
from tests.helpers import random_adata


@pytest.fixture(scope="module")
def reader(spark):
    """A function: paths and options to a DataFrame."""
    register(spark)

    def read(*paths, **options):
        named = {name: str(value) for name, value in options.items()}
        return spark.read.format("anndata").options(**named).load([str(path) for path in paths])

    return read


def assert_same_cells(found, adata):
    """Compare cells, genes, X, and obs as strings (JSON knows no categories)."""
    assert set(found.obs_names) == set(adata.obs_names)
    found = found[adata.obs_names]
    assert found.var_names.tolist() == adata.var_names.tolist()
    assert abs(found.X - ad.AnnData(adata.X).X).max() == 0
    for name in adata.obs:
        theirs, ours = adata.obs[name], found.obs[name]
        assert ((theirs.astype(str) == ours.astype(str)) | (theirs.isna() & ours.isna())).all(), name


def test_real_cells_are_read_in_several_tasks(reader, spark, data, pbmc3k, tmp_path):
    rows = reader(data / "pbmc3k.h5ad", cells_per_row=400, split_by="cell_type")
    assert rows.schema == spark.createDataFrame([], ROWS_DDL).schema
    lines = rows.toArrow().to_pylist()
    found = [from_row(line) for line in lines]
    assert all(part.n_obs <= 400 and part.obs["cell_type"].nunique(dropna=False) == 1 for part in found)
    assert {line["source"] for line in lines} == {str(data / "pbmc3k.h5ad")}
    assert_same_cells(ad.concat(found), pbmc3k)

    ad.concat([pbmc3k] * 5, index_unique="-").write_h5ad(tmp_path / "five.h5ad")  # 13,500 cells
    five = reader(tmp_path / "five.h5ad", cells_per_row=1000).select("n_obs", F.spark_partition_id().alias("task"))
    tasks = five.groupBy("task").agg(F.sum("n_obs").alias("cells")).orderBy("task").collect()
    assert [line["cells"] for line in tasks] == [5000, 5000, 3500]


@pytest.mark.parametrize("layout", ["csr", "csc", "dense", "zarr"])
@pytest.mark.parametrize("split_by", ["", "donor"])
def test_slices_of_any_layout_match_the_file(tmp_path, monkeypatch, layout, split_by):
    monkeypatch.setattr(files, "PARTITION_CELLS", 100)
    monkeypatch.setattr(files, "CSC_PARTITION_VALUES", 2_000)
    monkeypatch.setattr(files, "CSC_BLOCK_VALUES", 700)
    adata = random_adata(230, 60)
    adata.obs["missing"] = pd.array([None, True] * 115, dtype="boolean")
    adata.X = {"csc": adata.X.tocsc, "dense": adata.X.toarray}.get(layout, adata.X.copy)()
    path = tmp_path / f"some.{'zarr' if layout == 'zarr' else 'h5ad'}"
    adata.write_zarr(path) if layout == "zarr" else adata.write_h5ad(path)
    options = ReadOptions(cells_per_row=40, split_by=split_by)
    tasks = files.plan([str(path)], options)
    assert len(tasks) > 1 and all(len(task) <= 5 for task in tasks)
    found = ad.concat([from_row(row) for task in tasks for row in files.read(task, options)])
    assert found.n_obs == 230
    assert_same_cells(found, adata)


def test_globs_and_lists_of_files_are_read(reader, tmp_path):
    for name in ("a1", "a2", "b1"):
        random_adata(5, 8, seed=ord(name[0])).write_h5ad(tmp_path / f"{name}.h5ad")
    ids = reader(tmp_path / "a*.h5ad", tmp_path / "b1.h5ad").select("adata_id").orderBy("adata_id").collect()
    assert [line[0] for line in ids] == ["a1:0-5", "a2:0-5", "b1:0-5"]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"cells_per_row": "many"}, "cells_per_row"),
        ({"split_by": "nothing"}, "nothing"),
        ({"gene_symbols": "nothing"}, "nothing"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_wrong_option_fails_before_reading(reader, data, options, wanted):
    with pytest.raises(Exception, match=f"ConfigError: .*{wanted}"):
        reader(data / "pbmc3k.h5ad", **options).count()


def test_planning_reads_no_matrix(tmp_path):
    """A file whose matrix has 10^10 values that were never written: planned, and its cells read, in little memory."""
    path = tmp_path / "huge.h5ad"
    random_adata(3, 10_000, layout="dense").write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["X"], file["obs"]
        x = file.create_dataset("X", shape=(1_000_000, 10_000), dtype="f4", chunks=(100, 1000))
        x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        obs = file.create_group("obs")
        obs.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "i", "column-order": []})
        names = np.arange(1_000_000).astype("S8")
        obs.create_dataset("i", data=names, chunks=(100_000,), compression="lzf")
    script = f"""
        import json, resource
        from scgpt_batch.io.files import ReadOptions, plan, read
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tasks = plan([{str(path)!r}], ReadOptions())
        row = next(read(tasks[-1], ReadOptions()))
        print(json.dumps([len(tasks), row["n_obs"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    tasks, cells, kilobytes = json.loads(done.stdout.splitlines()[-1])
    assert (tasks, cells) == (200, 1000) and kilobytes < 500_000


def test_a_slice_names_its_row():
    assert Slice("/data/a.h5ad", "T cell", 0, 7).adata_id == "a:T cell:0-7"


def test_on_error_record_reads_the_other_files(tmp_path):
    random_adata(5, 8).write_h5ad(tmp_path / "good.h5ad")
    random_adata(30, 200).write_h5ad(tmp_path / "corrupt.h5ad", compression="gzip")
    with h5py.File(tmp_path / "corrupt.h5ad") as file:
        at = file["X/indices"].id.get_chunk_info(0).byte_offset
    with (tmp_path / "corrupt.h5ad").open("r+b") as file:
        file.seek(at)
        file.write(bytes(64))
    (tmp_path / "cut.h5ad").write_bytes(b"not HDF5")
    reader = AnnDataReader({"path": f"{tmp_path}/*.h5ad", "on_error": "record"})
    rows = [row for part in reader.partitions() for batch in reader.read(part) for row in batch.to_pylist()]
    assert [(row["adata_id"], row["error_class"]) for row in rows] == [
        (None, "FileError"), (None, "FileError"), ("good:0-5", None)
    ]  # fmt: skip
    assert rows[0]["error_message"].startswith(f"{tmp_path}/corrupt.h5ad: cannot be read: OSError")
    assert rows[2]["layer"] == "X" and rows[2]["sample_id"] == "good"

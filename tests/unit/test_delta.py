"""Delta tables at paths, read without Spark."""

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyarrow.fs import LocalFileSystem

from scgpt_batch.io.delta import open_dataset


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A table in folders whose names Delta encodes, at a relative path."""
    monkeypatch.chdir(tmp_path)
    table = pa.table({"group": ["a b", "c%20d", "x/y", "ü", None], "v": range(5)})
    write_deltalake("a table", table, partition_by=["group"])
    return "a table"


def test_data_set_has_the_lines_that_delta_rs_reads(path):
    expected = DeltaTable(path).to_pyarrow_table().sort_by("v")
    assert open_dataset(path).to_table().sort_by("v").equals(expected) and len(expected) == 5


def test_no_thread_of_arrow_needs_python(path):
    # one that calls Python while the process ends aborts it, which happened in a quarter of all runs of a short script
    assert isinstance(open_dataset(path).filesystem.base_fs, LocalFileSystem)

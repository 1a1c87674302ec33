"""Runs of `ingest` into one table at the same time."""

import threading

import numpy as np
import pytest

from scgpt_batch.cli.main import OK, main
from scgpt_batch.io.rows import from_row
from scgpt_batch.spark import tables
from tests.helpers import random_adata


@pytest.fixture
def merge_together(monkeypatch):
    """Hold each of two runs back until both have named their files and are about to commit."""
    upsert, both = tables.upsert_rows, threading.Barrier(2, timeout=120)
    arrived = []

    def wait(*args, **kwargs):
        arrived.append(threading.current_thread())
        if len(arrived) <= 2:
            both.wait()
        return upsert(*args, **kwargs)

    monkeypatch.setattr(tables, "upsert_rows", wait)


@pytest.mark.parametrize("new_table", [True, False])
def test_new_files_of_one_name_keep_their_rows(spark, run, tmp_path, merge_together, new_table):
    table = f"delta.`{tmp_path}/rows`"
    if not new_table:
        tables.create(spark, table, tables.ADATA_ROWS)
    paths = [tmp_path / folder / "sample.h5ad" for folder in ("one", "two")]
    for i, path in enumerate(paths):
        path.parent.mkdir()
        random_adata(10, 20, seed=i).write_h5ad(path)
    codes = []
    words = [["ingest", "--input", str(path), "--table", table] for path in paths]
    runs = [threading.Thread(target=lambda w=w: codes.append(main(w))) for w in words]
    for one in runs:
        one.start()
    for one in runs:
        one.join()
    assert codes == [OK, OK]
    rows = {row["source"]: from_row(row) for row in spark.table(table).toArrow().to_pylist()}
    assert set(rows) == set(map(str, paths))
    for i, path in enumerate(paths):
        assert np.array_equal(rows[str(path)].X.toarray(), random_adata(10, 20, seed=i).X.toarray())
    ids = {row[0] for row in spark.table(table).select("adata_id").collect()}
    assert ids in ({"sample:0-10", "one/sample:0-10"}, {"sample:0-10", "two/sample:0-10"})
    assert run("ingest", "--input", *paths, "--table", table)[1]["files_unchanged"] == 2

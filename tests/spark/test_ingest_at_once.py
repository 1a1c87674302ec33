"""`ingest` beside another run into the same table, and beside files that change while they are read."""

import threading
from contextlib import nullcontext

import numpy as np
import pytest

from scgpt_batch.cli.main import FAILED, OK, main
from scgpt_batch.io.rows import from_row
from scgpt_batch.spark import ingest, tables
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


def test_file_that_fails_at_a_second_read_keeps_its_rows(spark, run, tmp_path, monkeypatch):
    table, path, create = f"delta.`{tmp_path}/rows`", tmp_path / "sample.h5ad", tables.create
    words = ["ingest", "--input", path, "--table", table]
    random_adata(10, 20).write_h5ad(path)
    assert run(*words)[0] == OK
    random_adata(10, 20, seed=1).write_h5ad(path)

    def damage_and_create(*args, **options):
        if path.stat().st_size:
            path.write_bytes(b"")
        return create(*args, **options)

    monkeypatch.setattr(ingest, "persisted", nullcontext)  # as on compute that cannot keep what was read
    monkeypatch.setattr(tables, "create", damage_and_create)
    code, _, err = run(*words)
    assert code == FAILED and "was read once and then failed" in err, err
    assert [row["adata_id"] for row in spark.table(table).collect()] == ["sample:0-10"]

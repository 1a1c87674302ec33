"""`sb.embed` in a notebook gives the vectors that the batch job writes, and `sb.read_embeddings` finds them there."""

import numpy as np
import pytest

import scgpt_batch as sb
from scgpt_batch import api
from scgpt_batch.cli.main import OK, main
from tests.helpers import assert_close

COUNTS = {"data_is_raw": True, "log1p": True, "hvg_flavor": "seurat_v3", "subset_hvg": 200}
FLAGS = [word for name, value in COUNTS.items() for word in (f"--{name.replace('_', '-')}", str(value).lower())]


@pytest.fixture(scope="module")
def rows(spark, home, pbmc3k):
    """400 cells in three rows of one sample, as ingest divides a file."""
    pbmc3k[:400].write_h5ad(home / "cells.h5ad")
    table = f"delta.`{home}/rows`"
    assert main(["ingest", "--input", str(home / "cells.h5ad"), "--table", table, "--cells-per-row", "150"]) == OK
    return table


@pytest.mark.parametrize("mode", ["cell", "static", "contextual"])
def test_job_writes_the_vectors_of_sb_embed(spark, home, run, model, rows, pbmc3k, mode, monkeypatch):
    monkeypatch.setattr(api, "BLOCK_CELLS", 150)  # as ingest divides the file: sums of floats depend on the division
    table = f"delta.`{home}/{mode}`"
    code, summary, _ = run(
        "embed", "--model-uri", model, "--input-table", rows, "--output-table", table, "--mode", mode, *FLAGS
    )
    assert code == OK and summary["rows_ok"] == 3
    written, direct = pbmc3k[:400].copy(), pbmc3k[:400].copy()
    sb.read_embeddings(table, adata=written, mode=mode)
    sb.embed(direct, model, mode, **COUNTS)
    stored, wanted = (a.obsm if mode == "cell" else a.varm for a in (written, direct))
    assert_close(stored["X_scGPT"], wanted["X_scGPT"], atol=1e-6)
    assert written.uns["scgpt"]["version"] == direct.uns["scgpt"]["version"] == "1"
    named = sb.read_embeddings(table, mode=mode, to="pandas")
    assert len(named) == spark.table(table).count()
    assert np.isfinite(np.stack(named["embedding"])).all()

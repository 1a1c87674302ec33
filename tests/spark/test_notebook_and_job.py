"""`sb.embed` in a notebook gives the vectors that the batch job writes, and `sb.read_embeddings` finds them there."""

import numpy as np
import pytest

import scgpt_batch as sb
from scgpt_batch import api
from tests.helpers import assert_close

COUNTS = {"data_is_raw": True, "log1p": True, "hvg_flavor": "seurat_v3", "subset_hvg": 200}
FLAGS = [word for name, value in COUNTS.items() for word in (f"--{name.replace('_', '-')}", str(value).lower())]


@pytest.fixture(scope="module")
def file(home, pbmc3k):
    """400 cells that ingest cuts into three rows of one sample."""
    path = home / "cells.h5ad"
    pbmc3k[:400].write_h5ad(path)
    return path


@pytest.mark.parametrize("mode", ["cell", "static", "contextual"])
def test_the_job_writes_what_sb_embed_gives(spark, home, run, model, file, pbmc3k, mode, monkeypatch):
    monkeypatch.setattr(api, "BLOCK_CELLS", 150)  # as ingest cuts the file: sums of floats depend on where it is cut
    rows, table = f"delta.`{home}/rows`", f"delta.`{home}/{mode}`"
    assert run("ingest", "--input", file, "--table", rows, "--cells-per-row", "150")[0] == 0
    code, summary, _ = run(
        "embed", "--model-uri", model, "--input-table", rows, "--output-table", table, "--mode", mode, *FLAGS
    )
    assert code == 0 and summary["rows_ok"] == 3
    written, direct = pbmc3k[:400].copy(), pbmc3k[:400].copy()
    sb.read_embeddings(table, adata=written, mode=mode)
    sb.embed(direct, model, mode, **COUNTS)
    stored, wanted = (a.obsm if mode == "cell" else a.varm for a in (written, direct))
    assert_close(stored["X_scGPT"], wanted["X_scGPT"], atol=1e-6)
    assert written.uns["scgpt"]["version"] == direct.uns["scgpt"]["version"] == "1"
    named = sb.read_embeddings(table, mode=mode, to="pandas")
    assert len(named) == spark.table(table).count()
    assert np.isfinite(np.stack(named["embedding"])).all()

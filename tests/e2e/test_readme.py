"""The README's journey, word for word: its shell blocks as one script, then its Python, on two files of real cells."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from deltalake import DeltaTable

from tests.documents import shell_blocks
from tests.paths import REPO

README = REPO / "README.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pbmc3k, golden):
    """A folder with the files that the README names: two samples and a checkpoint.

    600 cells a row: to a hundred, seurat_v3 cannot fit its curve.
    """
    folder = tmp_path_factory.mktemp("readme")
    for i in (1, 2):
        cells = pbmc3k[1200 * (i - 1) : 1200 * i].copy()
        cells.obs["donor"] = np.where(np.arange(1200) % 2, "ann", "bob")
        cells.write_h5ad(folder / f"sample{i}.h5ad")
    shutil.copytree(golden / "checkpoint_flash", folder / "scGPT_human")
    return folder


@pytest.fixture(scope="module")
def said(folder):
    """What the shell blocks print, run one after the other; `/data` is a folder here."""
    script = "\n".join(shell_blocks(README)).replace("/data/", f"{folder}/data/")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_shell_blocks_ingest_register_embed_and_summarize(folder, said):
    ingested, registered, embedded, summary, cells = (
        json.loads(line) for line in said.splitlines() if line.startswith("{")
    )
    assert (ingested["rows"], ingested["cells"], ingested["files_failed"]) == (4, 2400, 0)
    assert registered["model_uri"] == "models:/scgpt/1"
    assert (embedded["mode"], embedded["rows_ok"], embedded["rows_failed"]) == ("static", 4, 0)
    assert summary["nearest_genes"].keys() == {"CD3D", "MS4A1"}
    assert (cells["mode"], cells["cells"]) == ("cell", 2400)
    vectors = DeltaTable(folder / "data" / "cell_embeddings").to_pyarrow_table()
    assert len(vectors) == 2400 and {len(vector) for vector in vectors["embedding"].to_pylist()} == {64}


def test_the_python_block_for_own_data_fills_the_anndata(folder, monkeypatch):
    monkeypatch.chdir(folder)
    adata = ad.read_h5ad(folder / "sample1.h5ad")
    *_, block = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    exec(block, {"adata": adata})
    assert adata.obsm["X_scGPT"].shape == (1200, 64) and np.isfinite(adata.obsm["X_scGPT"]).all()

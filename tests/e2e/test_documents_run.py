"""Every code block of the documents runs: its commands, its SQL and its Python, page by page, on real cells.

All commands share this process and its Spark session. Before a block runs, the test replaces what a page can only
name: `/data` by a temporary folder, `main.lab` by a schema, and `http://127.0.0.1:5000` by the address of its endpoint.
"""

import json
import shutil
import subprocess

import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from scgpt_batch.cli.main import ALERTS, OK, main
from scgpt_batch.io.rows import to_row
from tests.documents import DOCUMENTS, blocks, calls_of
from tests.endpoint_process import EndpointProcess
from tests.paths import REPO

LANGUAGES = ("sh", "bash", "sql", "python")
PAGES = ("index", "nightly", "embed", "ingest", "errors", "reading", "python", "migration", "which-embedding",
         "serving", "monitoring", "analysis", "report")  # fmt: skip
ELSEWHERE = {
    "README.md": "tests/e2e/test_readme.py",
    "docs/databricks.md": "tests/spark/test_deploy.py",
    "docs/reliability.md": "installs nginx, which needs a machine of its own",
    "CONTRIBUTING.md": "the commands of CI",
}
TABLES = ("adata_rows", "adata_rows_files", "gene_embeddings", "gene_embeddings_ledger", "cell_embeddings",
          "cell_embeddings_ledger", "cell_embeddings_runs")  # fmt: skip


@pytest.fixture(scope="module")
def prepared(home, golden, pbmc3k):
    """A folder with the files of cells and the checkpoint that the pages name."""
    home = home / "pages"
    cells = pbmc3k[:600].copy()  # to fewer, seurat_v3 cannot fit its curve
    cells.obs["donor"] = np.where(np.arange(600) % 2, "ann", "bob")
    for path in ("cells.h5ad", "atlas.h5ad", "data/a.h5ad", "data/incoming/b.h5ad"):
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        cells.write_h5ad(home / path)
    (home / "runs/1/outs").mkdir(parents=True)
    write_10x_h5(cells, home / "runs/1/outs/filtered_feature_bc_matrix.h5")
    (home / "reactome.gmt").write_text("T cell receptor\t\tCD3D\tCD3E\tCD3G\tCD2\n")
    for name in ("new_cells", "atlas_cells"):
        (home / "data" / name).symlink_to("cell_embeddings")
    (home / "examples").symlink_to(REPO / "examples")
    (home / "scGPT_human").symlink_to(golden / "checkpoint_flash")
    return home


def write_10x_h5(cells, path):
    """A file as Cell Ranger writes it."""
    with h5py.File(path, "w") as file:
        group, x = file.create_group("matrix"), cells.X.tocsr()
        parts = {"data": x.data.astype(np.int32), "indices": x.indices, "indptr": x.indptr, "shape": x.shape[::-1],
                 "barcodes": cells.obs_names.to_numpy("S")}  # fmt: skip
        for name, values in parts.items():
            group[name] = values
        features = group.create_group("features")
        for name, values in {"id": cells.var["gene_ids"], "name": cells.var_names}.items():
            features[name] = np.asarray(values, dtype="S")
        features["feature_type"] = np.full(cells.n_vars, b"Gene Expression")


@pytest.fixture(scope="module")
def with_tables(spark, prepared):
    """The folder with the tables that the pages read, written by the script of the page on nightly runs."""
    script, *_ = (text for language, text in blocks(REPO / "docs/nightly.md") if language == "sh")
    codes = [main(words) for words in calls_of(placed(script, prepared))]
    assert codes == [OK, OK, OK]
    rows, genes = f"delta.`{prepared}/data/adata_rows`", f"delta.`{prepared}/data/gene_embeddings`"
    for mode in ("static", "contextual"):
        words = ["--model-uri", "models:/scgpt@champion", "--input-table", rows, "--output-table", genes]
        assert main(["embed", *words, "--mode", mode, "--need-preprocess", "false"]) == OK  # all genes of the cells
    return prepared


@pytest.fixture
def folder(spark, with_tables, tmp_path):
    """A copy for one page, whose commands may change it; the tables have names too."""
    copy = shutil.copytree(with_tables, tmp_path / "pages", symlinks=True)
    for name in TABLES:
        spark.sql(f"drop table if exists default.{name}")
        spark.sql(f"create table default.{name} using delta location '{copy}/data/{name}'")
    return copy


@pytest.fixture(scope="module")
def endpoint(registered, prepared):
    with EndpointProcess(registered.uri, prepared.parent, "--batch-wait-ms", "0") as running:
        assert running.post({"dataframe_records": [], "params": {}}).status_code  # the inference table exists
        yield running


def placed(text, folder, endpoint=None):
    """Return the text with this test's folder, schema and endpoint in place of those that the page names."""
    text = text.replace("main.lab.", "default.").replace("main.scgpt.", "default.")
    if endpoint:
        text = text.replace("/data/scgpt_payload", str(endpoint.table))
        for url in ("http://127.0.0.1:5000", "http://127.0.0.1:5001", "https://WORKSPACE/serving-endpoints/NAME"):
            text = text.replace(url, endpoint.url)
    return text.replace("/data/", f"{folder}/data/")


def run_block(language, text, spark, names):
    if language == "sql":
        for statement in filter(str.strip, text.split(";")):
            spark.sql(statement).collect()
    elif language == "python":
        exec(text, names)
    else:
        for words in calls_of(text):
            if words[0] != "serve":  # runs until it is stopped; the endpoint of the test is one
                assert main(words) in (OK, ALERTS), words
        if "curl" in text:
            done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)
            assert done.returncode == 0 and json.loads(done.stdout)["predictions"][0]["cell_ids"], done


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, spark, folder, endpoint, pbmc3k, monkeypatch):
    monkeypatch.chdir(folder)
    adata, names = sc.read_h5ad("cells.h5ad"), {}
    rows = pd.DataFrame([to_row(adata[:5])])
    spark.read.table("default.adata_rows").createOrReplaceTempView("t")
    spark.sql(f"create table if not exists default.scgpt_payload using delta location '{endpoint.table}'")
    for language, text in blocks(REPO / f"docs/{page}.md"):
        names |= {"spark": spark, "adata": adata, "rows": rows}
        if language in LANGUAGES:
            run_block(language, placed(text, folder, endpoint), spark, names)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_is_run_by_a_test(document):
    name = document.relative_to(REPO).as_posix()
    if any(language in LANGUAGES for language, _ in blocks(document)):
        assert name in ELSEWHERE or name in [f"docs/{page}.md" for page in PAGES]

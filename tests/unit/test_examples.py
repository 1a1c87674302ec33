"""The examples in docstrings run as they are printed in the reference, on a small checkpoint and real cells."""

import doctest
import inspect
import shutil
import warnings
from importlib import import_module

import numpy as np
import pyarrow as pa
import pytest
import scanpy as sc
from deltalake import write_deltalake

import scgpt_batch as sb
from tests.paths import REPO

FUNCTIONS = ["embed", "gene_embeddings", "load_model", "read_embeddings", "similar_genes", "Parameters"]
SECTIONS = ("Returns", "Raises", "Examples")


@pytest.fixture
def names(tmp_path, monkeypatch, golden, pbmc3k):
    """The names that the examples use; a checkpoint and a table are in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(golden / "checkpoint_flash", "scGPT_human")
    adata = pbmc3k[:40].copy()
    n = adata.n_obs
    columns = {"adata_id": ["cells:0-40"] * n, "cell_id": adata.obs_names.tolist(),
               "embedding": pa.array(list(np.ones((n, 4), np.float32)), pa.list_(pa.float32()))}  # fmt: skip
    columns |= {name: ["1"] * n for name in ("model_name", "model_version", "params_hash", "run_id")}
    columns |= {"mode": ["cell"] * n, "embedded_at": pa.array([0] * n, pa.timestamp("us", "UTC"))}
    write_deltalake("data/cell_embeddings", pa.table(columns))
    return {"sb": sb, "sc": sc, "adata": adata}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_example_of_the_docstring_runs(name, names, capsys):
    (example, *_) = doctest.DocTestFinder(recurse=False).find(getattr(sb, name), name, globs=names)
    assert len(example.examples) >= 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        failed, _ = doctest.DocTestRunner().run(example)
    assert not failed, capsys.readouterr().out


ANALYSIS = [path.stem for path in sorted((REPO / "scgpt_batch/analysis").glob("[a-z]*.py"))]


@pytest.mark.parametrize("module", ANALYSIS)
def test_examples_of_an_analysis_module_run(module, names, pbmc3k, capsys):
    adata = pbmc3k[pbmc3k.obs["cell_type"].isin(["B", "NK"])][:200].copy()
    adata.obsm["X_scGPT"] = np.random.default_rng(0).normal(size=(adata.n_obs, 8))
    code = import_module(f"scgpt_batch.analysis.{module}")
    globs = vars(code) | names | {"adata": adata}
    found = [each for each in doctest.DocTestFinder().find(code, globs=globs) if each.examples]
    assert found
    for example in found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            failed, _ = doctest.DocTestRunner().run(example)
        assert not failed, capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "Parameters"])
def test_docstring_says_what_is_returned_and_raised(name):
    text = inspect.getdoc(getattr(sb, name))
    assert [title for title in SECTIONS if f"\n{title}\n{'-' * len(title)}\n" not in text] == []


def test_every_public_name_is_documented():
    assert [name for name in sb.__all__ if not inspect.getdoc(getattr(sb, name))] == []
    assert set(FUNCTIONS) == {name for name in sb.__all__ if name not in ("errors", "EmbeddingWarning", "LoadedModel")}


def test_no_example_is_skipped():
    for name in ("api", "embedding_tables", "parameters", *(f"analysis.{module}" for module in ANALYSIS)):
        assert "+SKIP" not in inspect.getsource(import_module(f"scgpt_batch.{name}"))

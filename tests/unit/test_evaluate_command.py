"""`evaluate`: figures of a table at a path beside a baseline, without Spark."""

import sys

import numpy as np
import pandas as pd
import pytest
from deltalake import DeltaTable, write_deltalake

from scgpt_batch.analysis.evaluate import compare, drift
from scgpt_batch.cli.analysis_tables import EVALUATIONS
from scgpt_batch.cli.main import OK, WRONG_USAGE
from tests.analysis_data import (
    CELLS,
    cell_lines,
    cluster_vectors,
    embedding_lines,
    gene_lines,
    labelled_cells,
    write_labelled_cells,
)


@pytest.fixture
def folder(tmp_path):
    write_deltalake(str(tmp_path / "vectors"), cell_lines())
    write_labelled_cells(tmp_path)
    return tmp_path


@pytest.fixture
def evaluate(run, folder):
    def call(*more, embeddings="vectors", **changed):
        values = {"obs": folder / "cells.h5ad", "label-column": "cell_type"} | changed
        words = (word for name, value in values.items() if value for word in (f"--{name}", value))
        return run("evaluate", "--embeddings", folder / embeddings, *words, *more)

    return call


def test_figures_are_those_of_the_function_beside_the_baseline(evaluate, folder):
    code, result, _ = evaluate("--batch-column", "batch", "--out", folder / "out")
    assert code == OK and result["cells"] == CELLS and result["baseline"] == "HVG + PCA"
    expected = compare(cluster_vectors(), labelled_cells(), "cell_type", batch_key="batch")
    for row in expected.table.itertuples():
        assert result["metrics"][row.metric]["value"] == pytest.approx(row.embedding, abs=1e-6)
        assert result["metrics"][row.metric]["baseline"] == pytest.approx(row.baseline, abs=1e-4)
    assert result["verdict"] == expected.verdict
    stored = DeltaTable(str(folder / "out")).to_pandas()
    assert set(stored.columns) == set(EVALUATIONS.names)
    assert stored.set_index("metric")["value"].to_dict() == {
        name: values["value"] for name, values in result["metrics"].items()
    }


def test_measuring_again_replaces_the_figures(evaluate, folder):
    evaluate("--out", folder / "out", obs=folder / "cells.csv")
    n_lines = len(DeltaTable(str(folder / "out")).to_pandas())
    evaluate("--out", folder / "out", obs=folder / "cells.csv")
    assert len(DeltaTable(str(folder / "out")).to_pandas()) == n_lines


def test_labels_without_counts_have_no_baseline(evaluate, folder):
    code, result, _ = evaluate(obs=folder / "cells.csv")
    assert code == OK and result["metrics"]["knn_accuracy"] == {"value": 1.0, "baseline": None}
    assert "no HVG + PCA to compare with" in result["verdict"]


def test_cells_without_label_and_rare_labels_are_left_out_and_counted(evaluate, folder, caplog):
    cells = labelled_cells()
    labels = cells.obs["cell_type"].astype(object).to_numpy()
    labels[:7] = None
    labels[7:9] = "rare"
    cells.obs["cell_type"] = labels
    cells.write_h5ad(folder / "some.h5ad")
    code, result, _ = evaluate(obs=folder / "some.h5ad")
    assert (code, result["cells"]) == (OK, CELLS - 9)
    assert "7 cells have no label and are left out" in caplog.text
    assert "labels of fewer than 5 cells are left out: 'rare'" in caplog.text


def test_many_cells_are_sampled_and_it_is_said(evaluate, folder, caplog):
    n = 150
    write_deltalake(str(folder / "many"), cell_lines(n))
    labelled_cells(n).write_h5ad(folder / "many.h5ad")
    code, result, _ = evaluate("--max-cells", 100, embeddings="many", obs=folder / "many.h5ad")
    assert (code, result["cells"]) == (OK, 100)
    assert "a random sample of 100 of 150 cells is measured" in caplog.text


def test_drift_from_another_version_is_that_of_the_function(evaluate, folder):
    moved = cluster_vectors() + 0.1 * np.random.default_rng(5).standard_normal((CELLS, 8)).astype(np.float32)
    keys = [("donor:0-90", f"c{i}") for i in range(CELLS)]
    write_deltalake(str(folder / "vectors"), embedding_lines(keys, moved, version="2", hours=1), mode="append")
    code, result, _ = evaluate("--compare-version", 1)
    assert code == OK
    for name, value in drift(cluster_vectors(), moved, k=15).items():
        assert result["metrics"][f"drift_{name}"]["value"] == pytest.approx(value, abs=1e-5)


def test_gene_embeddings_are_measured_by_families(evaluate, folder):
    names = [f"RPL{i}" for i in range(1, 21)] + [f"GENE{i}" for i in range(70)]
    vectors = np.random.default_rng(0).standard_normal((90, 16)).astype(np.float32)
    vectors[:20] += 8
    lines = embedding_lines([("s", name) for name in names], vectors, kind="gene", mode="static")
    write_deltalake(str(folder / "genes"), lines)
    code, result, _ = evaluate(embeddings="genes", obs="", **{"label-column": ""})
    assert code == OK and result["genes"] == 90
    assert result["metrics"]["ribosomal"]["value"] == 1.0 and result["metrics"]["ribosomal"]["baseline"] < 0.5
    assert result["verdict"].startswith("Among the 10 nearest of these 90 genes, 100% of a gene's family are found")


def test_no_spark_is_started(evaluate, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "scgpt_batch.spark.session", None)
    assert evaluate(obs=folder / "cells.csv")[0] == OK


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"obs": "", "label-column": ""}, "give --obs and --label-column"),
        ({"obs": ""}, "obs and label_column go together"),
        ({"label-column": "cel_type"}, "has no column 'cel_type': did you mean 'cell_type'?"),
        ({"batch-column": "batsh"}, "has no column 'batsh': did you mean 'batch'?"),
        ({"compare-version": "9"}, "has no embeddings of mode 'cell', model_version '9'"),
    ],
)
def test_wrong_usage_is_named(evaluate, changed, message):
    code, _, err = evaluate(**changed)
    assert code == WRONG_USAGE and message in err


def test_one_label_is_too_few(evaluate, folder):
    pd.DataFrame({"cell_id": [f"c{i}" for i in range(CELLS)], "cell_type": "B"}).to_csv(folder / "one.csv", index=False)
    code, _, err = evaluate(obs=folder / "one.csv")
    assert code == WRONG_USAGE and "has 1 label of at least 5 cells" in err


def test_labels_do_not_apply_to_gene_embeddings(evaluate, folder):
    write_deltalake(str(folder / "genes"), gene_lines())
    code, _, err = evaluate(embeddings="genes")
    assert code == WRONG_USAGE and "gene embeddings, which --obs does not apply to" in err

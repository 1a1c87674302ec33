"""`annotate`: labels from a reference table at a path, without Spark."""

import json
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from scgpt_batch.analysis.annotate import nearest_cells, transfer_labels
from scgpt_batch.cli.analysis_tables import ANNOTATIONS
from scgpt_batch.cli.main import OK, WRONG_USAGE
from scgpt_batch.io.rows import to_row
from tests.analysis_data import (
    CELLS,
    cell_lines,
    cluster_vectors,
    embedding_lines,
    labelled_cells,
    names_of,
    write_labelled_cells,
)

QUERY = [f"q{i}" for i in range(30)]


@pytest.fixture
def folder(tmp_path):
    """A reference table, a query table, and the labels of the reference as .h5ad and .csv."""
    write_deltalake(str(tmp_path / "reference"), cell_lines())
    keys = [("new:0-30", name) for name in QUERY]
    write_deltalake(str(tmp_path / "query"), embedding_lines(keys, cluster_vectors(30, seed=3)))
    write_labelled_cells(tmp_path)
    return tmp_path


@pytest.fixture
def annotate(run, folder):
    def call(*more, **changed):
        values = {"query": folder / "query", "reference": folder / "reference", "labels": folder / "cells.h5ad"}
        values |= {"label-column": "cell_type", "out": folder / "out"} | changed
        return run("annotate", *(word for name, value in values.items() for word in (f"--{name}", value)), *more)

    return call


def rows(folder, name="out"):
    return DeltaTable(str(folder / name)).to_pandas().sort_values("cell_id", ignore_index=True)


def test_cells_get_the_label_of_their_cluster(annotate, folder):
    code, result, _ = annotate()
    assert code == OK
    assert (result["cells"], result["unknown"], result["table"]) == (30, 0, str(folder / "out"))
    found = rows(folder).set_index("cell_id").loc[QUERY]
    assert found["label"].tolist() == [("B", "NK", "T")[i % 3] for i in range(30)]
    assert (found["confidence"] == 1).all() and (found["label"] == found["label_weighted"]).all()


def test_lines_hold_neighbours_distances_and_both_tables(annotate, folder):
    annotate("--neighbours", 4)
    found = rows(folder).set_index("cell_id").loc[QUERY]
    expected = nearest_cells(cluster_vectors(30, seed=3), cluster_vectors(), 4)
    assert np.stack(found["neighbours"]).tolist() == [[f"c{i}" for i in row] for row in expected.index]
    assert np.allclose(np.stack(found["distances"]), expected.distance, atol=1e-6)
    line = found.iloc[0]
    assert line["source_table"] == f"delta.`{folder / 'query'}`"
    assert line["reference_table"] == f"delta.`{folder / 'reference'}`"
    assert (line["model_name"], line["model_version"], line["params_hash"], line["mode"]) == ("scgpt", "1", "p", "cell")
    assert json.loads(line["params"])["neighbours"] == 4
    assert set(found.columns) | {"cell_id"} == set(ANNOTATIONS.names)


@pytest.mark.parametrize("name", ["cells.h5ad", "cells.csv", "rows", "labels", "cells.parquet"])
def test_labels_may_be_a_file_or_a_table(annotate, folder, name):
    cells = labelled_cells()
    if name == "rows":
        row = {"adata_id": "donor:0-90", **to_row(cells)}
        write_deltalake(str(folder / name), pa.Table.from_pylist([row]))
    elif name == "labels":
        cells_table = pa.table({"cell_id": names_of(), "cell_type": list(cells.obs["cell_type"])})
        write_deltalake(str(folder / name), cells_table)
    elif name == "cells.parquet":
        cells.obs.to_parquet(folder / name)
    assert annotate(labels=folder / name)[0] == OK
    assert rows(folder).set_index("cell_id")["label"].loc[QUERY[:3]].tolist() == ["B", "NK", "T"]


def test_annotating_again_replaces_the_lines(annotate, folder):
    annotate()
    annotate("--neighbours", 3)
    assert len(rows(folder)) == 30 and len(rows(folder)["neighbours"][0]) == 3
    annotate(query=folder / "reference")
    assert len(rows(folder)) == 30 + CELLS  # those of another query table stay


def test_a_cell_does_not_vote_on_itself(annotate, folder):
    assert annotate(query=folder / "reference")[0] == OK
    found = rows(folder)
    assert not any(row.cell_id in row.neighbours for row in found.itertuples())
    assert {len(names) for names in found["neighbours"]} == {10}


def test_cells_without_a_label_do_not_vote(annotate, folder):
    cells = labelled_cells()
    cells.obs["cell_type"] = pd.Series(cells.obs["cell_type"].astype(object)).where(np.arange(CELLS) % 3 != 0, None)
    cells.write_h5ad(folder / "some.h5ad")
    assert annotate(labels=folder / "some.h5ad")[1]["reference_cells"] == 60
    assert set(rows(folder)["label"]) == {"NK", "T"}


def test_cells_of_several_labels_are_unknown(annotate, folder):
    keys = [("new:0-1", "between")]
    between = cluster_vectors(3).mean(axis=0, keepdims=True)
    write_deltalake(str(folder / "between"), embedding_lines(keys, between))
    code, result, _ = annotate("--min-confidence", 0.95, query=folder / "between")
    assert (code, result["unknown"]) == (OK, 1) and rows(folder)["label"].tolist() == ["unknown"]


def test_votes_by_cluster_and_corrected_for_frequency_are_those_of_the_function(annotate, folder):
    assert annotate("--vote", "cluster", "--correct-frequency", "--metric", "euclidean")[0] == OK
    neighbors = nearest_cells(cluster_vectors(30, seed=3), cluster_vectors(), 10, metric="euclidean")
    labels = np.array(labelled_cells().obs["cell_type"], dtype=object)
    expected = transfer_labels(neighbors, labels, correct_frequency=True, clusters=np.arange(30) % 3)
    found = rows(folder).set_index("cell_id").loc[QUERY]
    assert found["label"].tolist() == expected["label"].tolist()
    assert np.allclose(found["confidence_weighted"], expected["confidence_weighted"])


def test_no_spark_is_started(annotate, monkeypatch):
    monkeypatch.setitem(sys.modules, "scgpt_batch.spark.session", None)
    assert annotate()[0] == OK


def test_the_newest_version_of_both_tables_is_used_and_named(annotate, folder, caplog):
    write_deltalake(str(folder / "reference"), cell_lines(version="2", hours=1), mode="append")
    keys = [("new:0-30", name) for name in QUERY]
    newer = embedding_lines(keys, cluster_vectors(30, seed=3), version="2", hours=1)
    write_deltalake(str(folder / "query"), newer, mode="append")
    code, _, _ = annotate()
    assert code == OK and set(rows(folder)["model_version"]) == {"2"}
    assert "also has cell vectors of scgpt version 1, parameters p, which are not read" in caplog.text
    assert annotate("--model-version", 1)[0] == OK
    assert sorted(set(rows(folder)["model_version"])) == ["1", "2"]


def test_different_models_are_an_error_that_names_what_both_have(annotate, folder):
    write_deltalake(str(folder / "query"), cell_lines(30, version="2", hours=1), mode="append")
    code, _, err = annotate()
    assert code == WRONG_USAGE
    assert "scgpt version 2, parameters p" in err and "scgpt version 1, parameters p" in err
    assert "both tables have cell vectors of scgpt version 1, parameters p: choose it with --model-version" in err
    write_deltalake(str(folder / "query"), cell_lines(30, params="other"), mode="overwrite")
    assert "are not comparable: embed one of the tables again" in annotate()[2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label-column": "celltype"}, "cells.h5ad has no column 'celltype': did you mean 'cell_type'?"),
        ({"labels": "nothing.csv"}, "no file matches nothing.csv; check the path"),
        ({"labels": "nothing.h5ad"}, "no file matches nothing.h5ad; check the path"),
        ({"query": "/nothing"}, "no Delta table at /nothing"),
        ({"neighbours": 500}, "90 cells of"),
    ],
)
def test_wrong_usage_is_named_and_nothing_written(annotate, folder, changed, message):
    code, _, err = annotate(**changed)
    assert code == WRONG_USAGE and message in err
    assert not (folder / "out").exists()


def test_cells_with_nan_in_their_vectors_are_left_out(annotate, folder, caplog):
    vectors = cluster_vectors(30, seed=3)
    vectors[4, 1] = np.nan
    write_deltalake(
        str(folder / "query"), embedding_lines([("new:0-30", name) for name in QUERY], vectors), mode="overwrite"
    )
    code, result, _ = annotate()
    assert (code, result["cells"]) == (OK, 29) and QUERY[4] not in set(rows(folder)["cell_id"])
    assert "1 cell has NaN or infinity in the vector and is left out" in caplog.text


def test_an_empty_table_is_an_error(annotate, folder):
    write_deltalake(str(folder / "query"), cell_lines().slice(0, 0), mode="overwrite")
    code, _, err = annotate()
    assert code == WRONG_USAGE and f"{folder / 'query'} has no embeddings of mode 'cell'" in err


def test_labels_of_other_cells_are_an_error(annotate, folder):
    pd.DataFrame({"cell_id": ["x", "y"], "cell_type": ["B", "T"]}).to_csv(folder / "other.csv", index=False)
    code, _, err = annotate(labels=folder / "other.csv")
    assert code == WRONG_USAGE and "none of the 90 cells of" in err and "(first: 'x')" in err


def test_reference_cells_that_are_not_in_the_labels_are_counted(annotate, folder, caplog):
    labelled_cells().obs.iloc[:80].to_csv(folder / "some.csv")
    code, result, _ = annotate(labels=folder / "some.csv")
    assert code == OK and result["reference_cells"] == 80
    assert "10 of 90 cells of" in caplog.text and "(first: 'c80', 'c81', 'c82')" in caplog.text


def test_repeated_names_need_the_row(annotate, folder):
    write_deltalake(str(folder / "reference"), cell_lines(adata_id="other:0-90"), mode="append")
    code, _, err = annotate()
    assert code == WRONG_USAGE and "several cells named 'c0' (rows donor:0-90, other:0-90)" in err
    labels = labelled_cells().obs.assign(cell_id=names_of(), adata_id="other:0-90")
    labels.to_csv(folder / "with_rows.csv", index=False)
    assert annotate(labels=folder / "with_rows.csv")[1]["reference_cells"] == CELLS


def test_a_cell_labelled_twice_is_an_error(annotate, folder):
    labels = labelled_cells().obs.assign(cell_id=["c0", *names_of()[:-1]])
    labels.to_csv(folder / "twice.csv", index=False)
    code, _, err = annotate(labels=folder / "twice.csv")
    assert code == WRONG_USAGE and "repeats 1 cells (first: 'c0')" in err


def test_a_table_of_other_things_is_not_overwritten(annotate, folder):
    write_deltalake(str(folder / "out"), pa.table({"x": [1]}))
    code, _, err = annotate()
    assert code == WRONG_USAGE and "it lacks the columns adata_id, cell_id" in err
    assert DeltaTable(str(folder / "out")).to_pandas()["x"].tolist() == [1]


def test_a_file_with_repeated_names_is_matched_as_ingest_names_them(annotate, folder):
    cells = labelled_cells()
    cells.obs_names = ["c0", "c0", *names_of()[2:]]
    cells.write_h5ad(folder / "repeated.h5ad")
    lines = [("donor:0-90", name) for name in ["c0", "c0-1", *names_of()[2:]]]
    write_deltalake(str(folder / "reference"), embedding_lines(lines, cluster_vectors()), mode="overwrite")
    assert annotate(labels=folder / "repeated.h5ad")[1]["reference_cells"] == CELLS
    assert ad.read_h5ad(folder / "repeated.h5ad").n_obs == CELLS

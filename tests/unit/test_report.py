"""`report`: a self-contained page of tables at a path, without Spark."""

import base64
import json
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from scgpt_batch.cli.main import OK, WRONG_USAGE
from scgpt_batch.cli.report import read_contents
from scgpt_batch.report import maps
from scgpt_batch.report.movement import mean_vectors, movement
from scgpt_batch.report.neighbours import nearest_genes
from scgpt_batch.report.projection import PLACED_BY, principal_components, project
from scgpt_batch.settings import ReportSettings
from tests.analysis_data import START, cell_lines, cluster_vectors, gene_lines, labelled_cells

HOSTILE = "</script><img src=x onerror='window.hacked=1'>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Cell embeddings with a ledger, contextual gene embeddings of two groups, and cells with labels and counts."""
    folder = tmp_path_factory.mktemp("tables")
    write_deltalake(str(folder / "cells"), cell_lines())
    moved = cluster_vectors(seed=1)
    moved[7] = -moved[7]
    groups = [
        gene_lines(mode="contextual", group="T"),
        gene_lines(mode="contextual", group=HOSTILE, vectors=moved),
    ]
    write_deltalake(str(folder / "genes"), pa.concat_tables(groups))
    ledger = pd.DataFrame({
        "adata_id": ["a", "b"], "mode": "cell", "model_name": "scgpt", "model_version": "1", "params_hash": "p",
        "status": ["ok", "failed"], "coverage": [0.9, None], "warnings": [["few genes"], []],
        "error_class": [None, "LowCoverage"], "error_message": [None, HOSTILE], "at": START,
    })  # fmt: skip
    write_deltalake(str(folder / "cells_ledger"), pa.Table.from_pandas(ledger, preserve_index=False))
    programs = pd.DataFrame({
        "program": "P1 G0 G3", "gene": [f"G{i}" for i in range(0, 30, 3)], "rank": range(1, 11), "stability": 0.9,
    })  # fmt: skip
    write_deltalake(str(folder / "programs"), pa.Table.from_pandas(programs, preserve_index=False))
    labelled_cells().write_h5ad(folder / "cells.h5ad")
    return folder


@pytest.fixture
def report(run, folder, tmp_path):
    def call(*more, tables=("cells", "genes", "programs"), obs=True):
        of_cells = ["--obs", folder / "cells.h5ad", "--label-column", "cell_type"] if obs else []
        words = ["--embeddings", *(folder / table for table in tables), "--report", tmp_path / "page.html"]
        code, line, err = run("report", *words, *of_cells, *more)
        path = tmp_path / "page.html"
        return code, line, err, path.read_text(encoding="utf-8") if path.exists() else ""

    return call


def block(text, name):
    return json.loads(re.search(rf'id="{name}-data">(.*?)</script>', text)[1])


def test_page_has_a_section_for_each_table(report, tmp_path):
    code, line, _, text = report()
    assert code == OK and line["report"] == str(tmp_path / "page.html")
    assert (line["cells"], line["genes"]) == (90, 90)
    headings = re.findall(r"<h2 [^>]*>(.*?)</h2>", text)
    assert headings == ["What ran", "Cells", "Genes", "Gene programs", "Genes between groups", "Evaluation",
                        "How this page was made"]  # fmt: skip
    assert "1 of 2" in text and "LowCoverage" in text and "few genes" in text
    assert "HVG + PCA" in text and "Mean score by group" in text
    cells = block(text, "cells")
    assert cells["columns"][0]["name"] == "cell_type" and cells["columns"][0]["counts"] == [30, 30, 30]
    assert any(column["name"].startswith("score ") for column in cells["columns"])


def test_stored_figures_have_a_verdict(report, folder):
    figures = pd.DataFrame({
        "metric": ["knn_accuracy", "avg_bio", "drift_mean_cosine"], "value": [0.8, 0.9, 1.0],
        "baseline": [0.7, 0.5, None], "label_column": "cell_type",
    })  # fmt: skip
    write_deltalake(str(folder / "figures"), pa.Table.from_pandas(figures, preserve_index=False), mode="overwrite")
    text = report(tables=("cells", "figures"))[3]
    assert "the embedding separates the labels better than HVG + PCA" in text


def test_text_of_tables_is_escaped(report):
    text = report()[3]
    assert HOSTILE not in text and "<img" not in text
    assert text.count("<script") == text.count("</script>") == 4  # two of data, two of code
    assert HOSTILE in block(text, "genes")["groups"]["names"]


def test_same_tables_give_the_same_page(report):
    assert report(obs=False)[3] == report(obs=False)[3]


def test_gene_that_differs_most_between_groups_comes_first(report):
    rows = re.findall(r'data-gene="(\d+)">(\w+)<', report(obs=False)[3])
    assert rows[0] == ("7", "G7") or rows[0][1] == "G7"


def test_static_figures_are_written_on_request(report, tmp_path):
    _, line, _, _ = report("--format", "svg")
    names = ["page_cells.svg", "page_genes.svg", "page_programs.svg"]
    assert line["figures"] == [str(tmp_path / name) for name in names]
    assert all((tmp_path / name).stat().st_size > 5_000 for name in names)


@pytest.mark.parametrize("tables", [("cells",), ("genes",)])
def test_cells_or_genes_alone_have_a_page(report, tables):
    code, _, err, page = report(tables=tables, obs=tables == ("cells",))
    assert code == OK, err
    assert [f'id="{kind}-data"' in page for kind in ("cells", "genes")] == [
        kind in tables for kind in ("cells", "genes")
    ]


def test_programs_are_scored_without_a_table_of_genes(report):
    code, _, err, page = report(tables=("cells", "programs"))
    assert code == OK, err
    (data,) = re.findall(r'id="cells-data">(.*?)</script>', page)
    assert "score P1 G0 G3" in data


def test_scores_of_repeated_cell_names_are_matched_by_row(tmp_path):
    """Two rows have cells of the same names; each cell keeps the score of its own row."""
    lines = pa.concat_tables([cell_lines(), cell_lines(adata_id="other:0-90")])
    write_deltalake(str(tmp_path / "cells"), lines)
    rows = lines.select(["adata_id", "cell_id"]).to_pandas()
    scores = rows.assign(
        group=pd.Series([None] * len(rows), dtype=object), program="P1", score=np.arange(len(rows)) % 7.0
    )
    write_deltalake(str(tmp_path / "scores"), pa.Table.from_pandas(scores, preserve_index=False))
    found = read_contents(
        ReportSettings(embeddings=(str(tmp_path / "cells"), str(tmp_path / "scores")), report="page.html")
    )
    shown = zip(found.cells.obs["row (adata_id)"], found.cells.names, found.cells.scores["P1"], strict=True)
    wanted = scores[["adata_id", "cell_id", "score"]]
    assert sorted(shown) == sorted(wanted.itertuples(index=False, name=None))


def test_page_with_one_label_is_not_evaluated_and_says_so(run, folder, tmp_path):
    names = cell_lines().column("cell_id").to_pylist()
    pd.DataFrame({"cell_id": names, "donor": "d1"}).to_csv(tmp_path / "donors.csv", index=False)
    code, _, err = run("report", "--embeddings", folder / "cells", "--report", tmp_path / "page.html",
                       "--obs", tmp_path / "donors.csv", "--label-column", "donor")  # fmt: skip
    assert code == OK, err
    assert "two are needed" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_table_of_another_kind_is_an_error(report):
    code, _, err, text = report(tables=("cells_ledger",), obs=False)
    assert code == WRONG_USAGE and "is not a table that the report can show" in err and text == ""


def test_label_column_that_does_not_exist_is_an_error(report):
    code, _, err, _ = report("--label-column", "celltype")
    assert code == WRONG_USAGE and "cell_type" in err


def test_map_keeps_clusters_together_also_for_points_that_are_placed(monkeypatch):
    monkeypatch.setattr("scgpt_batch.report.projection.LANDMARKS", 60)
    x = cluster_vectors(300)
    found = project(x)
    assert found.landmarks == 60 and np.isfinite(found.xy).all()
    of = np.arange(300) % 3
    centres = np.array([found.xy[of == i].mean(axis=0) for i in range(3)])
    nearest = ((found.xy[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == of).all()
    assert f"between its {PLACED_BY} nearest" in found.described("cell")


def test_principal_components_keep_distances():
    x = cluster_vectors(50)
    reduced, variance = principal_components(x)
    assert variance == pytest.approx(1)
    assert np.linalg.norm(reduced[0] - reduced[1]) == pytest.approx(np.linalg.norm(x[0] - x[1]), rel=1e-5)


@pytest.mark.parametrize("exact", [10_000, 10], ids=["all pairs", "in parts"])
def test_nearest_genes_are_those_of_all_pairs(monkeypatch, exact):
    monkeypatch.setattr("scgpt_batch.report.neighbours.EXACT", exact)
    x = np.random.default_rng(0).standard_normal((400, 16)).astype(np.float32)
    found = nearest_genes(x, 5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -1)
    assert (found.index == np.argsort(-similarity, axis=1)[:, :5]).all() and found.recall == 1
    assert found.cosine == pytest.approx(np.take_along_axis(similarity, found.index, axis=1), abs=1e-6)


def test_movement_names_the_groups_that_are_farthest_apart():
    groups = {
        "a": pd.DataFrame([[1.0, 0.0], [1.0, 0.0]], index=["G1", "G2"]),
        "b": pd.DataFrame([[1.0, 0.1], [0.0, 1.0]], index=["G1", "G2"]),
        "c": pd.DataFrame([[1.0, 0.0]], index=["G1"]),
    }
    found = movement(groups)
    assert found.table[["gene", "groups"]].to_numpy().tolist() == [["G2", 2], ["G1", 3]]
    assert found.table.loc[0, "least_cosine"] == pytest.approx(0)
    assert set(found.table.loc[0, ["group", "other_group"]]) == {"a", "b"}
    assert mean_vectors(groups).loc["G2"].tolist() == [0.5, 0.5]
    assert movement({None: groups["a"]}) is None


def test_columns_of_a_map_are_bytes():
    number = maps.column("n", pd.Series([0.0, 5.0, None, 10.0]))
    assert list(base64.b64decode(number["values"])) == [0, 127, maps.MISSING, 254]
    assert (number["min"], number["max"]) == (0, 10)
    kind = maps.column("kind", pd.Series(["T", "B", None, "T"], dtype="category"))
    assert kind["categories"] == ["T", "B"] and list(base64.b64decode(kind["values"])) == [0, 1, maps.MISSING, 0]


def test_columns_with_another_text_for_each_cell_are_left_out():
    frame = pd.DataFrame({"barcode": [f"c{i}" for i in range(300)], "type": ["T", "B"] * 150, "none": None})
    made, left_out = maps.columns(frame)
    assert [column["name"] for column in made] == ["type"] and left_out == ["barcode", "none"]

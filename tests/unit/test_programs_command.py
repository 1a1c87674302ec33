"""`programs`: gene programs, scores and enrichment of a table at a path, without Spark."""

import json
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scanpy as sc
from deltalake import DeltaTable, write_deltalake

from scgpt_batch.analysis.programs import find_programs, score_programs
from scgpt_batch.cli.analysis_tables import GENE_PROGRAMS, PROGRAM_ENRICHMENT, PROGRAM_SCORES
from scgpt_batch.cli.main import OK, WRONG_USAGE, main
from scgpt_batch.io.rows import to_row
from tests.analysis_data import CELLS, cell_lines, cluster_vectors, embedding_lines, gene_lines, labelled_cells


@pytest.fixture
def folder(tmp_path):
    """Static vectors of 90 genes in two rows, and cells with counts."""
    write_deltalake(str(tmp_path / "genes"), pa.concat_tables([gene_lines(), gene_lines(adata_id="donor:90-99")]))
    labelled_cells().write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path


@pytest.fixture
def programs(run, folder):
    def call(*more, embeddings="genes"):
        words = ["--embeddings", folder / embeddings, "--out", folder / "out", "--resolution", 1, "--seeds", 2]
        return run("programs", *words, *more)

    return call


def rows(folder, name="out"):
    return DeltaTable(str(folder / name)).to_pandas()


def test_programs_are_the_clusters_of_the_table(programs, folder):
    code, result, _ = programs()
    assert (code, result["programs"], result["genes"]) == (OK, 3, CELLS)
    found = rows(folder)
    assert set(found.columns) == set(GENE_PROGRAMS.names)
    numbers = found["gene"].str[1:].astype(int) % 3
    assert numbers.groupby(found["program"]).nunique().tolist() == [1, 1, 1]
    assert found.groupby("program")["rank"].apply(sorted).iloc[0] == list(range(1, 31))
    assert found["group"].isna().all() and set(found["mode"]) == {"static"} and set(found["model_version"]) == {"1"}
    assert json.loads(found["params"][0]) == {"min_genes": 5, "neighbours": 15, "resolution": 1.0, "seeds": 2}


def test_running_again_replaces_the_programs(programs, folder):
    programs()
    first = rows(folder)
    programs("--min-genes", 6)
    again = rows(folder)
    assert len(again) == len(first) and again["run_id"].nunique() == 1
    assert again["run_id"][0] != first["run_id"][0]
    newer = gene_lines(version="2", hours=1)
    write_deltalake(str(folder / "genes"), newer, mode="append")
    programs()
    assert rows(folder)["model_version"].value_counts().to_dict() == {"1": CELLS, "2": CELLS}


def test_contextual_programs_are_of_the_mean_over_samples_of_each_group(programs, folder):
    vectors = cluster_vectors()
    tables = [
        gene_lines(mode="contextual", group="T", vectors=vectors - 1, n_cells=1, adata_id="s1"),
        gene_lines(mode="contextual", group="T", vectors=vectors + 1 / 3, n_cells=3, adata_id="s2"),
        gene_lines(mode="contextual", group="B", vectors=vectors[::-1], adata_id="s1"),
    ]
    write_deltalake(str(folder / "contextual"), pa.concat_tables(tables))
    code, result, _ = programs(embeddings="contextual")
    assert (code, result["programs"]) == (OK, 6)
    found = rows(folder)
    assert set(found["group"]) == {"B", "T"} and found["program"].str.startswith(("B: P", "T: P")).all()
    expected = find_programs(
        pd.DataFrame(vectors, index=[f"G{i}" for i in range(CELLS)]).sort_index(), resolution=1, n_seeds=2
    )
    of_group = found[found["group"] == "T"].set_index("gene")["program"].str.removeprefix("T: ")
    assert of_group.to_dict() == expected.set_index("gene")["program"].to_dict()


@pytest.mark.parametrize("source", ["cells.h5ad", "rows"])
def test_scores_are_those_of_the_function(programs, folder, source):
    cells = labelled_cells()
    if source == "rows":
        parts = [{"adata_id": f"donor:{i}", **to_row(cells[i : i + 45])} for i in (0, 45)]
        write_deltalake(str(folder / source), pa.Table.from_pylist(parts))
    assert programs("--cells", folder / source)[1]["scores"] == CELLS * 3
    scores = rows(folder, "out_scores")
    assert set(scores.columns) == set(PROGRAM_SCORES.names)
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    members = rows(folder).groupby("program")["gene"].apply(list).to_dict()
    expected = score_programs(cells, members)
    found = scores.pivot(index="cell_id", columns="program", values="score").loc[expected.index, expected.columns]
    assert np.allclose(found, expected, atol=1e-6)
    assert scores["adata_id"].notna().all() == (source == "rows")


def test_scores_of_groups_are_means_over_their_cells(programs, folder):
    programs("--cells", folder / "cells.h5ad")
    code, result, _ = programs(
        "--cells", folder / "cells.h5ad", "--group-by", "cell_type", "--scores-table", folder / "m"
    )
    assert code == OK and result["scores_table"] == str(folder / "m")
    groups, cells = rows(folder, "m"), rows(folder, "out_scores")
    labels = labelled_cells().obs["cell_type"]
    expected = cells.assign(group=cells["cell_id"].map(labels.to_dict())).groupby(["group", "program"])["score"].mean()
    assert groups.set_index(["group", "program"])["score"].to_dict() == pytest.approx(expected.to_dict())
    assert groups["cell_id"].isna().all()


def test_people_see_the_group_and_the_gene_set_of_a_program(folder, capsys):
    (folder / "sets.gmt").write_text("THIRD\t\t" + "\t".join(f"G{i}" for i in range(0, CELLS, 3)))
    words = ["--embeddings", folder / "genes", "--out", folder / "out", "--resolution", 1, "--seeds", 1]
    words += ["--cells", folder / "cells.h5ad", "--group-by", "cell_type", "--gmt", folder / "sets.gmt"]
    assert main(["programs", *map(str, words)]) == OK
    lines = [line for line in capsys.readouterr().out.splitlines() if "stability" in line]
    assert len(lines) == 3 and all("30 genes, stability 1.00: G" in line for line in lines)
    (of_b,) = [line for line in lines if line.endswith("(highest in B, THIRD)")]
    assert int(of_b.split(": G")[1].split()[0]) % 3 == 0


def test_enrichment_names_the_set_of_a_program(programs, folder):
    genes = "\t".join(f"G{i}" for i in range(0, CELLS, 3))
    (folder / "sets.gmt").write_text(f"EVERY THIRD\t\t{genes}\nMIXED\t\tG0\tG1\tG2\n")
    assert programs("--gmt", folder / "sets.gmt")[0] == OK
    table = rows(folder, "out_enrichment").sort_values("p_value")
    assert set(table.columns) == set(PROGRAM_ENRICHMENT.names)
    best = table.iloc[0]
    assert best["term"] == "EVERY THIRD" and len(best["genes"]) == 30 and best["p_adjusted"] < 1e-20


def test_no_spark_is_started(programs, monkeypatch):
    monkeypatch.setitem(sys.modules, "scgpt_batch.spark.session", None)
    assert programs()[0] == OK


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode", "contextual"], "has no embeddings of mode 'contextual'"),
        (["--min-genes", 80], "no cluster of the genes of"),
        (["--group-by", "cell_type"], "group_by and scores_table need cells"),
        (["--cells", "CELLS", "--group-by", "celltype"], "has no column 'celltype': did you mean 'cell_type'?"),
        (["--gmt", "missing.gmt"], "cannot read missing.gmt"),
    ],
)
def test_wrong_usage_is_named_and_nothing_written(programs, folder, words, message):
    code, _, err = programs(*(folder / "cells.h5ad" if word == "CELLS" else word for word in words))
    assert code == WRONG_USAGE and message in err
    assert not (folder / "out").exists()


def test_cell_embeddings_are_an_error(programs, folder):
    write_deltalake(str(folder / "cells"), cell_lines())
    code, _, err = programs(embeddings="cells")
    assert code == WRONG_USAGE and "not a table of gene embeddings: embed with --mode static or contextual" in err


def test_an_empty_table_is_an_error(programs, folder):
    write_deltalake(str(folder / "empty"), gene_lines().slice(0, 0))
    code, _, err = programs(embeddings="empty")
    assert code == WRONG_USAGE and f"{folder / 'empty'} has no embeddings" in err


def test_both_modes_in_a_table_need_a_choice(programs, folder):
    write_deltalake(str(folder / "genes"), gene_lines(mode="contextual", hours=1), mode="append")
    code, _, err = programs()
    assert code == WRONG_USAGE and "choose one with --mode" in err
    assert programs("--mode", "static")[1]["genes"] == CELLS


def test_cells_without_a_known_gene_are_an_error(programs, folder):
    cells = labelled_cells()
    cells.var_names = [f"ENSG{i}" for i in range(cells.n_vars)]
    cells.write_h5ad(folder / "ids.h5ad")
    code, _, err = programs("--cells", folder / "ids.h5ad")
    assert code == WRONG_USAGE and "are the names gene symbols?" in err


def test_values_that_are_no_counts_are_scored_as_they_are(programs, folder, caplog):
    cells = labelled_cells()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    ad.AnnData(cells.X, obs=cells.obs, var=cells.var).write_h5ad(folder / "logs.h5ad")
    programs("--cells", folder / "cells.h5ad")
    counts = rows(folder, "out_scores").sort_values(["cell_id", "program"])["score"].to_numpy()
    code, _, _ = programs("--cells", folder / "logs.h5ad")
    assert code == OK and "are not counts; they are taken as logarithms" in caplog.text
    logs = rows(folder, "out_scores").sort_values(["cell_id", "program"])["score"].to_numpy()
    assert np.allclose(counts, logs, atol=1e-5)


def test_a_group_of_few_genes_gets_no_programs(programs, folder, caplog):
    few = embedding_lines(
        [("s", f"G{i}") for i in range(4)], cluster_vectors(4), kind="gene", mode="contextual", group="B"
    )
    write_deltalake(str(folder / "few"), pa.concat_tables([few, gene_lines(mode="contextual", group="T")]))
    code, result, _ = programs(embeddings="few")
    assert (code, result["programs"]) == (OK, 3) and "group 'B' has vectors of 4 genes only" in caplog.text

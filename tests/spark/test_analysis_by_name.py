"""`programs`, `annotate`, `evaluate` on tables by name: through Spark, with the results of tables at paths."""

import re

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

import scgpt_batch as sb
from scgpt_batch.cli.analysis_tables import AnalysisTables
from scgpt_batch.cli.main import OK, WRONG_USAGE
from scgpt_batch.errors import ConfigError
from scgpt_batch.io.rows import to_row
from tests.analysis_data import CELLS, cell_lines, cluster_vectors, embedding_lines, gene_lines, labelled_cells
from tests.paths import REPO

MADE_OF = ["source_table", "source_version", "run_id", "written_at", "reference_table", "reference_version", "labels"]


@pytest.fixture
def both(spark, tmp_path):
    """A function: write lines to a table by name and to one at a path; return both."""

    def write(name, lines):
        spark.createDataFrame(lines).write.format("delta").mode("overwrite").saveAsTable(name)
        write_deltalake(str(tmp_path / name), lines, mode="overwrite")
        return name, str(tmp_path / name)

    return write


def assert_same(spark, name, path, keys):
    stored, at_path = spark.read.table(name).toPandas(), DeltaTable(path).to_pandas()
    frames = [
        frame.drop(columns=MADE_OF, errors="ignore").sort_values(keys, ignore_index=True) for frame in (stored, at_path)
    ]
    assert list(frames[0].columns) == list(frames[1].columns) and len(frames[0])
    for column in frames[0].columns:
        left, right = (list(frame[column]) for frame in frames)
        assert all(_equal(a, b) for a, b in zip(left, right, strict=True)), column


def _equal(a, b):
    if isinstance(a, np.ndarray | list):
        return np.array_equal(a, b) if isinstance(a[0], str) else np.allclose(a, b, atol=1e-6)
    return a == b or (a is None and b is None) or (isinstance(a, float) and np.isclose(a, b, equal_nan=True))


def test_annotations_by_name_equal_those_at_paths(spark, both, run, tmp_path):
    keys = [("new:0-30", f"q{i}") for i in range(30)]
    queries = both("a_query", embedding_lines(keys, cluster_vectors(30, seed=3)))
    references = both("a_reference", cell_lines())
    obs = labelled_cells().obs
    labels = both("a_labels", pa.table({"cell_id": list(obs.index), "cell_type": list(obs["cell_type"])}))
    outs = "a_annotations", str(tmp_path / "out")
    for query, reference, source, out in zip(queries, references, labels, outs, strict=True):
        words = ["--query", query, "--reference", reference, "--labels", source, "--label-column", "cell_type"]
        for _ in range(2):  # the second time replaces the first
            code, result, _ = run("annotate", *words, "--out", out)
            assert (code, result["cells"]) == (OK, 30)
    assert_same(spark, *outs, ["cell_id"])


def test_programs_by_name_equal_those_at_paths(spark, both, run, tmp_path):
    lines = pa.concat_tables([gene_lines(), gene_lines(adata_id="donor:90-99"), gene_lines(version="0", hours=-1)])
    tables = both("p_genes", lines)
    outs = "p_programs", str(tmp_path / "out")
    labelled_cells().write_h5ad(tmp_path / "cells.h5ad")
    for table, out in zip(tables, outs, strict=True):
        words = [
            "--embeddings",
            table,
            "--out",
            out,
            "--resolution",
            1,
            "--seeds",
            2,
            "--cells",
            tmp_path / "cells.h5ad",
        ]
        code, result, _ = run("programs", *words, "--cells", tmp_path / "cells.h5ad")
        assert (code, result["genes"]) == (OK, CELLS)
    assert_same(spark, *outs, ["program", "rank"])
    assert_same(spark, "p_programs_scores", str(tmp_path / "out_scores"), ["cell_id", "program"])


def test_figures_by_name_equal_those_at_paths(spark, both, run, tmp_path):
    tables = both("e_cells", cell_lines())
    labelled_cells().obs.to_csv(tmp_path / "cells.csv")
    outs = "e_figures", str(tmp_path / "out")
    for table, out in zip(tables, outs, strict=True):
        words = ["--embeddings", table, "--obs", tmp_path / "cells.csv", "--label-column", "cell_type", "--out", out]
        assert run("evaluate", *words)[0] == OK
    assert_same(spark, *outs, ["metric"])


def test_a_table_of_another_kind_is_not_changed(spark, both, run):
    name, _ = both("o_genes", gene_lines())
    columns = spark.table(name).columns
    code, _, err = run("programs", "--embeddings", name, "--out", name, "--resolution", 1, "--seeds", 1)
    assert code != OK and "program" in err
    assert spark.table(name).columns == columns and spark.table(name).count() == CELLS


def test_a_name_that_spark_does_not_know_is_an_error(spark):
    with pytest.raises(ConfigError, match="the Spark session has no table no_such_table: check its name"):
        sb.read_embeddings("no_such_table")


def test_a_misspelt_table_name_is_suggested(spark, both, run):
    both("s_genes", gene_lines(10))
    code, _, err = run("programs", "--embeddings", "s_gene", "--out", "s_programs")
    assert code == WRONG_USAGE and "did you mean s_genes?" in err


def test_nearest_genes_in_sql_equal_those_in_python(spark, both):
    newer = cluster_vectors(seed=7, d=6)  # the query takes four numbers at a time
    lines = [gene_lines(), gene_lines(version="2", hours=1, vectors=newer)]
    name, path = both("n_genes", pa.concat_tables([*lines, gene_lines(adata_id="s", version="2", vectors=newer)]))
    query = (REPO / "examples" / "sql" / "similar_genes.sql").read_text()
    found = spark.sql(query, args={"table": name, "gene": "G5", "k": 10}).toPandas()
    expected = sb.similar_genes(path, "G5", k=10)
    assert found["neighbour"].tolist() == expected["neighbour"].tolist()
    assert np.allclose(found["similarity"], expected["similarity"], atol=1e-6)
    assert found["rank"].tolist() == list(range(1, 11))


def test_nearest_genes_are_found_in_a_table_by_name(spark, both):
    name, path = both("m_genes", gene_lines())
    expected = sb.similar_genes(path, ["G5", "G7"], k=3)
    for given in (name, f"default.{name}", f"spark_catalog.default.{name}"):
        assert sb.similar_genes(given, ["G5", "G7"], k=3).equals(expected)


def test_a_misspelt_name_of_gene_vectors_is_an_error(spark, both):
    with pytest.raises(ConfigError, match=r"the Spark session has no table default\.no_genes: check its name"):
        sb.similar_genes("default.no_genes", "G5")
    with pytest.raises(ConfigError, match="no model at 'no_genes'"):
        sb.similar_genes("no_genes", "G5")


def test_the_documented_sql_function_finds_the_nearest_genes(spark, both):
    name, path = both("f_genes", gene_lines(vectors=cluster_vectors(d=7)))
    (block,) = re.findall(r"```sql\n(create .*?)```", (REPO / "docs" / "analysis.md").read_text(), re.DOTALL)
    for statement in block.replace("main.lab.gene_embeddings", name).split(";"):
        if statement.strip():
            spark.sql(statement)
    found = spark.sql("select * from similar_genes('G5', 4) order by similarity desc").toPandas()
    assert found["neighbour"].tolist() == sb.similar_genes(path, "G5", k=4)["neighbour"].tolist()


def test_all_readings_of_a_named_table_are_of_one_version(spark, both):
    name, _ = both("v_genes", gene_lines())
    tables = AnalysisTables({})
    tables.columns(name)
    later = gene_lines(version="2", hours=1)
    spark.createDataFrame(later).write.format("delta").mode("append").saveAsTable(name)
    assert tables.values(name, "model_version") == ["1"]
    assert tables.read(name, ["run_id"]).num_rows == CELLS
    assert tables.embeddings(name).model["model_version"] == "1"
    assert tables.static_lines(name, "").model["model_version"] == "1"
    made_of = tables.made_of(name, tables.embeddings(name).model, {})
    assert made_of["source_version"] == tables.version(name) < AnalysisTables({}).version(name)


def test_the_report_of_named_tables_equals_that_of_paths(spark, both, run, tmp_path):
    rows = [{"adata_id": "donor:0-90", **to_row(labelled_cells())}]
    pairs = [both("r_cells", cell_lines()), both("r_genes", gene_lines()), both("r_rows", pa.Table.from_pylist(rows))]
    pages = []
    for number, (cells, genes, obs) in enumerate(zip(*pairs, strict=True)):
        page = tmp_path / f"{number}.html"
        words = ["--embeddings", cells, genes, "--obs", obs, "--label-column", "cell_type", "--report", page]
        code, result, _ = run("report", *words)
        assert (code, result["cells"], result["genes"]) == (OK, CELLS, CELLS)
        text = page.read_text().replace("<wbr>", "")
        for table in (cells, genes, obs):
            text = text.replace(table, "TABLE")
        text = re.sub(r'"[\w+/]{40,}=*"', "numbers", text)  # whose last digit depends on where vectors are in memory
        parts = re.findall(r"<(?:script|section)[^>]*>.*?</(?:script|section)>", text, re.DOTALL)
        pages.append([part for part in parts if 'id="made"' not in part])  # names the tables that do not exist
    assert len(pages[0]) > 5
    for by_name, at_path in zip(*pages, strict=True):
        assert by_name == at_path

"""The key `embedding_id` of the embedding tables, and the table that a vector search index follows."""

import hashlib
import re

import numpy as np
import pytest

from scgpt_batch.analysis.annotate import nearest_cells
from scgpt_batch.cli.main import OK, WRONG_USAGE
from scgpt_batch.spark import tables
from tests.databricks_workspace import Workspace, served
from tests.helpers import CELL, name_version, small_rows, write_rows
from tests.paths import REPO

STATIC = ["--mode", "static", "--need-preprocess", "false"]


@pytest.fixture
def table(tmp_path, spark, golden):
    """A table with three rows of three cells."""
    write_rows(spark, small_rows(3, golden), f"delta.`{tmp_path}/rows`")
    return f"delta.`{tmp_path}/rows`"


@pytest.fixture
def search(tmp_path):
    return f"delta.`{tmp_path}/search`"


def hashed(*key):
    """The id of a key, as the documents define it."""
    text = "".join("-" if value is None else f"{len(value.encode())}:{value}" for value in key)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def version(spark, table):
    return spark.sql(f"describe history {table} limit 1").first()["version"]


def changes(spark, table, since):
    """The kinds of changes in a table's change feed since a version, with their number."""
    feed = spark.sql(f"select * from table_changes('{table}', {since})") if "`" not in table else (
        spark.read.option("readChangeFeed", "true").option("startingVersion", since).format("delta").load(
            table.split("`")[1])
    )  # fmt: skip
    return {row["_change_type"]: row["count"] for row in feed.groupBy("_change_type").count().collect()}


# The key


def test_embedding_id_is_the_hash_of_the_key(spark):
    keys = [("r1", None, "CD3D", "static"), ("r1", "", "CD3D", "static"), ("r", "1", "CD3D", "static"),
            ("ä:€", "-", "1:a", "cell")]  # fmt: skip
    columns = ("adata_id", "group", "gene", "mode")
    frame = spark.createDataFrame(keys, "adata_id string, `group` string, gene string, mode string")
    found = [row[0] for row in frame.selectExpr(tables.embedding_id(columns)).collect()]
    assert found == [hashed(*key) for key in keys]
    assert len(set(found)) == len(keys) and found[0] == "e6d906350297e93044f4fe9114e0c52a"


def test_embed_writes_the_id_of_each_line(spark, embed, out):
    assert embed(*CELL)[0] == OK
    lines = spark.table(out).collect()
    assert [row["embedding_id"] for row in lines] == [
        hashed(*(row[name] for name in tables.CELL_KEY)) for row in lines
    ]  # fmt: skip
    assert len({row["embedding_id"] for row in lines}) == len(lines) == 9


@pytest.mark.parametrize("flags", [CELL, STATIC], ids=["cell", "static"])
def test_lines_of_an_earlier_version_get_their_id(spark, embed, out, flags):
    assert embed(*flags)[0] == OK
    before = {row["embedding_id"]: row["embedding"] for row in spark.table(out).collect()}
    forget_ids(spark, out)
    code, summary, _ = embed(*flags)
    assert (code, summary["rows_ok"], summary["rows_skipped"]) == (OK, 0, 3)
    assert {row["embedding_id"]: row["embedding"] for row in spark.table(out).collect()} == before
    last = version(spark, out)
    assert embed(*flags)[0] == OK and version(spark, out) == last


def forget_ids(spark, table):
    """Make a table one of an earlier version, without the column."""
    path, rows = table.split("`")[1], spark.table(table).drop("embedding_id").toPandas()
    columns = tables.CELL_EMBEDDINGS if "cell_id" in rows else tables.GENE_EMBEDDINGS
    earlier = spark.createDataFrame(rows, columns.replace(", embedding_id STRING", ""))
    earlier.write.format("delta").mode("overwrite").option("overwriteSchema", "true").save(path)
    assert "embedding_id" not in spark.table(table).columns


# The search table


def test_search_table_has_one_unit_vector_for_each_cell(spark, embed, out, search):
    assert embed(*CELL, "--search-table", search)[0] == OK
    wanted = {row["embedding_id"]: row["embedding"] for row in spark.table(out).collect()}
    found = {row["embedding_id"]: row["embedding"] for row in spark.table(search).collect()}
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[key] for key in found], [wanted[key] for key in found], atol=1e-6)
    properties = {row["key"]: row["value"] for row in spark.sql(f"show tblproperties {search}").collect()}
    assert properties["delta.enableChangeDataFeed"] == "true"


def test_search_table_has_one_unit_vector_for_each_gene(spark, embed, out, search):
    assert embed(*STATIC, "--search-table", search)[0] == OK
    genes = {row["gene"]: np.array(row["embedding"]) for row in spark.table(out).collect()}
    found = {row["gene"]: row for row in spark.table(search).collect()}
    assert found.keys() == genes.keys() and spark.table(search).count() == len(found)
    for gene, row in found.items():
        np.testing.assert_allclose(row["embedding"], genes[gene] / np.linalg.norm(genes[gene]), atol=1e-6)
        assert row["embedding_id"] == hashed(*(row[name] for name in tables.GENE_KEY)) and row["adata_id"] is None


def test_change_feed_has_only_what_changed(spark, embed, table, search):
    assert embed(*CELL, "--search-table", search)[0] == OK
    last = version(spark, search)
    assert embed(*CELL, "--search-table", search)[0] == OK
    assert version(spark, search) == last  # nothing changed, so nothing was committed
    spark.sql(f"delete from {table} where adata_id = 'good-000'")
    spark.sql(f"update {table} set x_data = transform(x_data, x -> x + 1f), content_hash = null "
              "where adata_id = 'good-001'")  # fmt: skip
    assert embed(*CELL, "--search-table", search)[0] == OK
    assert changes(spark, search, last + 1) == {"delete": 3, "update_preimage": 3, "update_postimage": 3}


def test_search_table_holds_the_version_of_the_run(spark, embed, out, search):
    name_version("scgpt_search", "1", "champion")
    name_version("scgpt_search", "2", "challenger")
    for number in ("1", "2", "1"):  # the last run embeds nothing: its rows are there
        code, *_ = embed(*CELL, "--search-table", search, model_uri=f"models:/scgpt_search/{number}")
        found = {row["model_version"] for row in spark.table(search).select("model_version").collect()}
        assert (code, found, spark.table(search).count()) == (OK, {number}, 9)
    assert spark.table(out).count() == 18


def test_table_with_other_lines_is_not_emptied(spark, embed, search):
    assert embed(*CELL, "--search-table", search)[0] == OK
    spark.sql(f"alter table {search} unset tblproperties ('scgpt_batch.search_table')")
    code, _, err = embed(*CELL, "--search-table", search)
    assert (code, spark.table(search).count()) == (WRONG_USAGE, 9)
    assert "is not a search table" in err and "--search-table" in err


# Searching it


@pytest.fixture
def cells(spark, embed, search):
    """The search table's cells, as pandas."""
    assert embed(*CELL, "--search-table", search)[0] == OK
    return spark.table(search).orderBy("adata_id", "cell_id").toPandas()


def test_documented_sql_finds_the_same_cells_as_annotate(spark, cells, search):
    spark.table(search).createOrReplaceTempView("cell_search")
    query = (REPO / "examples" / "sql" / "nearest_cells.sql").read_text()
    given = {"table": "cell_search", "adata_id": "good-001", "cell_id": "b", "k": 4}
    found = spark.sql(query, args=given).toPandas()
    vectors = np.stack(cells["embedding"])
    (place,) = np.flatnonzero((cells["adata_id"] == "good-001") & (cells["cell_id"] == "b"))
    expected = nearest_cells(vectors[[place]], vectors, k=5)
    others = [i for i in expected.index[0] if i != place]
    assert found["cell_id"].tolist() == cells["cell_id"].iloc[others].tolist()
    assert found["adata_id"].tolist() == cells["adata_id"].iloc[others].tolist()
    np.testing.assert_allclose(found["similarity"], 1 - expected.distance[0][1:], atol=1e-5)


def test_documented_query_of_an_index_returns_the_nearest_cells(cells, monkeypatch, tmp_path):
    workspace = Workspace(indexes={"main.scgpt.cell_index": 0})
    workspace.indexed = {"main.scgpt.cell_index": cells[["adata_id", "cell_id", "embedding"]].to_dict("records")}
    (recipe,) = re.findall(r"```python\n(.*?)```", documented("Vector search"), re.DOTALL)
    vectors = np.stack(cells["embedding"])
    expected = nearest_cells(vectors[:1], vectors, k=9)
    with served(workspace, monkeypatch, tmp_path):
        names = {"vector": vectors[0]}
        exec(recipe, names)
    rows = [(cells["adata_id"][i], cells["cell_id"][i]) for i in expected.index[0]]
    assert [tuple(row) for row, _ in names["nearest_cells"]] == rows
    np.testing.assert_allclose([cosine for _, cosine in names["nearest_cells"]], 1 - expected.distance[0], atol=1e-5)


def documented(title):
    """A section of docs/databricks.md."""
    text = (REPO / "docs" / "databricks.md").read_text(encoding="utf-8")
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]

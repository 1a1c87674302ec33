"""What a run and its tables tell a catalog: the input's version, and comments of tables and columns."""

import json

import mlflow
import pytest

from scgpt_batch.spark.comments import COLUMN_COMMENTS
from tests.helpers import CELL, small_rows, summary_of, write_rows


@pytest.fixture
def embedded(spark, model, golden):
    """A function that embeds a new table, given as a path or by name: the output table and the summary."""

    def embed(table):
        write_rows(spark, small_rows(1, golden), table)
        out = f"{table[:-1]}_out`" if table.endswith("`") else f"{table}_out"
        words = ["--model-uri", model, "--input-table", table, "--output-table", out]
        return out, summary_of("embed", *words, *CELL)

    return embed


@pytest.mark.parametrize("form", ["path", "name"])
def test_run_records_the_version_of_its_input(spark, embedded, home, form):
    table = f"delta.`{home}/lineage`" if form == "path" else "lineage_rows"
    _, summary = embedded(table)
    (found,) = mlflow.get_run(summary["run_id"]).inputs.dataset_inputs
    source = json.loads(found.dataset.source)
    assert source["delta_table_version"] == spark.sql(f"describe history {table} limit 1").first()["version"]
    assert (found.dataset.source_type, found.dataset.name) == ("delta_table", table)
    if form == "path":
        assert source["path"] == f"{home}/lineage"
    else:
        assert source["delta_table_name"].endswith("lineage_rows")


def test_tables_and_columns_of_plain_delta_have_comments(spark, embedded, home):
    out, _ = embedded(f"delta.`{home}/commented`")
    for table in (out, f"{out[:-1]}_ledger`", f"{out[:-1]}_runs`"):
        (detail,) = spark.sql(f"describe detail {table}").collect()
        assert "scGPT" in detail["description"]
        assert comments(spark, table) == {name: COLUMN_COMMENTS[name] for name in spark.table(table).columns}


def test_column_that_a_newer_version_adds_has_its_comment(spark, tmp_path):
    from scgpt_batch.spark import tables

    table = f"delta.`{tmp_path}/older`"
    earlier = tables.CELL_EMBEDDINGS.replace(", embedding_id STRING", "")
    spark.sql(f"create table {table} ({earlier}) using delta")
    tables.create(spark, table, tables.CELL_EMBEDDINGS)
    assert comments(spark, table) == {"embedding_id": COLUMN_COMMENTS["embedding_id"]}


def comments(spark, table):
    """The comments of a table's columns, of those that have one."""
    return {field.name: field.metadata["comment"] for field in spark.table(table).schema if "comment" in field.metadata}

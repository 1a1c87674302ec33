"""The summary of an embeddings table."""

from datetime import datetime, timedelta

import pytest

from scgpt_batch.cli.summary import summarize
from scgpt_batch.io.locations import delta_path
from scgpt_batch.settings import SummarySettings
from scgpt_batch.spark import tables

START = datetime(2026, 1, 1)


def write_table(spark, table, runs):
    """Write lines of two genes and the ledger's lines: a run is (rows, mode, version, status, vector, hours)."""
    ledger, lines = [], []
    for rows, mode, version, status, vector, hours in runs:
        at = START + timedelta(hours=hours)
        stamps = {"mode": mode, "model_name": "m", "model_version": version, "params_hash": "p", "run_id": f"r{hours}"}
        ledger += [
            stamps | {"adata_id": row, "content_hash": f"h{hours}", "status": status, "cells": 10, "at": at}
            for row in rows
        ]
        near = {"A": [1.0, 0.0], "B": vector, "C": [0.0, 1.0]} if status == "ok" else {}
        lines += [
            stamps | {"adata_id": row, "gene": gene, "embedding": values, "embedded_at": at}
            for row in rows
            for gene, values in near.items()
        ]
    append(spark, table, tables.GENE_EMBEDDINGS, lines)
    append(spark, tables.beside(table, "_ledger"), tables.LEDGER, ledger)


def append(spark, table, columns, lines):
    tables.create(spark, table, columns)
    schema = spark.table(table).schema
    values = [tuple(line.get(field.name) for field in schema) for line in lines]
    spark.createDataFrame(values, schema).write.format("delta").mode("append").saveAsTable(table)


@pytest.fixture(scope="module")
def result(spark, tmp_path_factory):
    """The summary of a table of two modes and two versions, whose row "b" failed first and "a" was embedded twice."""
    table = f"delta.`{tmp_path_factory.mktemp('summary')}/genes`"
    runs = [
        (["a"], "static", "1", "ok", [1.0, 0.1], 0),
        (["b"], "static", "1", "failed", None, 1),
        (["b", "c"], "static", "1", "ok", [1.0, 0.1], 2),
        (["c"], "static", "1", "failed", None, 3),
        (["a", "b"], "contextual", "1", "ok", [1.0, 0.1], 4),
        (["a"], "static", "2", "ok", [0.1, 1.0], 5),
    ]
    write_table(spark, table, runs)
    return summarize(SummarySettings(output_table=table, genes=("A", "B"), neighbours=1))


def test_summary_counts_each_row_once_over_modes_and_versions(result):
    assert (result.rows, result.cells, result.genes, result.embeddings) == (2, 20, 3, 18)


def test_summary_counts_rows_and_cells_of_each_mode_and_version(result):
    found = [(m["mode"], m["model_version"], m["rows"], m["cells"], m["embeddings"]) for m in result.models]
    assert found == [("contextual", "1", 2, 20, 6), ("static", "1", 2, 20, 9), ("static", "2", 1, 10, 3)]


def test_summary_takes_neighbours_from_the_newest_static_vectors(result):
    assert result.to_dict()["nearest_genes"] == {"A": ["B"], "B": ["C"]}


def test_summary_of_a_named_table_equals_that_of_its_path(spark, result):
    spark.sql(f"CREATE TABLE summarized USING delta LOCATION '{delta_path(result.output_table)}'")
    spark.sql(f"CREATE TABLE summarized_ledger USING delta LOCATION '{delta_path(result.ledger_table)}'")
    named = summarize(SummarySettings(output_table="summarized", genes=("A", "B"), neighbours=1))
    assert named.to_dict() == result.to_dict() | {"output_table": "summarized"}

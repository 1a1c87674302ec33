"""What catalogs get: of a new table a primary key, comments and a tag, of a run its input table."""

import json

import mlflow
import pytest

from scgpt_batch.cli import analysis_tables
from scgpt_batch.cli.analysis_tables import ddl
from scgpt_batch.spark import session, tables
from scgpt_batch.spark.comments import COLUMN_COMMENTS
from scgpt_batch.spark.lineage import log_input
from tests.databricks_workspace import Workspace
from tests.helpers import mlflow_store

OURS = ("ADATA_ROWS", "FILES", "GENE_EMBEDDINGS", "CELL_EMBEDDINGS", "LEDGER", "RUNS")
RESULTS = ("GENE_PROGRAMS", "PROGRAM_SCORES", "PROGRAM_ENRICHMENT", "ANNOTATIONS", "EVALUATIONS")


@pytest.fixture
def created(monkeypatch):
    """Create a table of embeddings; return the statements that the session got."""
    monkeypatch.setattr(tables, "_found_in_warehouse", lambda spark, table: False)

    def create(name, *, databricks=True, lacking=()):
        monkeypatch.setattr(session, "_has_databricks_connect", lambda: False)
        monkeypatch.delenv("DATABRICKS_RUNTIME_VERSION", raising=False)
        if databricks:
            monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "18.1")
        spark = Workspace(schemas={name.rpartition(".")[0]}, lacking=set(lacking)).sql()
        tables.create(spark, name, tables.CELL_EMBEDDINGS, comment="Vectors", key="embedding_id")
        return [statement for statement in spark.statements if "DESCRIBE" not in statement]

    return create


@pytest.mark.parametrize("name", ["main.lab.cells", "lab.cells"])
def test_new_table_in_unity_catalog_has_a_primary_key_and_a_tag(created, name):
    create, tag = created(name)
    assert "embedding_id STRING NOT NULL COMMENT" in create and ", PRIMARY KEY (`embedding_id`))" in create
    assert "USING delta COMMENT 'Vectors'" in create
    assert tag.startswith(f"ALTER TABLE {name} SET TAGS ('scgpt_batch' = ")


@pytest.mark.parametrize(
    ("name", "databricks"), [("main.lab.cells", False), ("hive_metastore.lab.cells", True), ("spark_catalog.a.b", True)]
)
def test_table_elsewhere_has_comments_only(created, name, databricks):
    (create,) = created(name, databricks=databricks)
    assert "COMMENT 'the vector'" in create and "PRIMARY KEY" not in create and "NOT NULL" not in create


def test_table_is_made_without_its_tag_if_a_policy_forbids_it(created, caplog):
    with caplog.at_level("INFO"):
        assert len(created("main.lab.cells", lacking={"APPLY TAG"})) == 2
    assert "main.lab.cells has no tag 'scgpt_batch'" in caplog.text and "APPLY TAG" in caplog.text


def test_every_column_of_every_table_has_a_comment():
    ddls = [*(getattr(tables, name) for name in OURS), *(ddl(getattr(analysis_tables, name)) for name in RESULTS)]
    names = {column.split()[0].strip("`") for columns in ddls for column in columns.split(",")}
    assert names == COLUMN_COMMENTS.keys()
    assert not any(set(text) & set("'\\$") for text in COLUMN_COMMENTS.values())  # Spark would read them otherwise


@pytest.mark.parametrize(
    ("table", "version", "source"),
    [
        ("delta.`/data/rows`", 0, {"path": "/data/rows", "delta_table_version": 0}),
        ("main.lab.rows", 7, {"delta_table_name": "main.lab.rows", "delta_table_version": 7}),
        ("main.lab.view", None, {"delta_table_name": "main.lab.view"}),
    ],
)
def test_run_has_its_input_table_and_version(tmp_path, caplog, table, version, source):
    with mlflow_store(tmp_path):
        with mlflow.start_run() as run:
            log_input(table, version)
        (found,) = mlflow.get_run(run.info.run_id).inputs.dataset_inputs
    assert (json.loads(found.dataset.source), found.dataset.name) == (source, table)
    assert "databricks" not in caplog.text  # no workspace is asked

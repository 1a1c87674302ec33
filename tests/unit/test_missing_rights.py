"""What commands say if the principal lacks a right in Unity Catalog."""

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from pyspark.errors import AnalysisException

from scgpt_batch.errors import ConfigError
from scgpt_batch.registry import register
from scgpt_batch.spark import tables
from tests.helpers import mlflow_store
from tests.paths import GOLDEN

DENIED = "[INSUFFICIENT_PERMISSIONS] Insufficient privileges: User does not have {} on {}. SQLSTATE: 42501"


class Catalog:
    """A session of a principal without a right."""

    catalog = property(lambda self: self)

    def __init__(self, right, schema_exists):
        self.right, self.schema_exists, self.said = right, schema_exists, []

    def tableExists(self, name):
        return False

    def databaseExists(self, name):
        return self.schema_exists

    def sql(self, statement):
        self.said.append(statement)
        if statement.startswith(self.right):
            raise AnalysisException(DENIED.format(self.right, "'main'"))
        raise AnalysisException("[TABLE_OR_VIEW_NOT_FOUND] no such table")


@pytest.fixture(autouse=True)
def persistent_catalog(monkeypatch):
    monkeypatch.setattr(tables, "_found_in_warehouse", lambda spark, table: False)


def test_without_create_schema_the_right_is_named():
    with pytest.raises(ConfigError, match=r"cannot create schema main\.lab: .*needs CREATE SCHEMA and USE CATALOG"):
        tables.create(Catalog("CREATE SCHEMA", schema_exists=False), "main.lab.rows", tables.ADATA_ROWS)


def test_existing_schema_needs_no_right_to_create_it():
    session = Catalog("CREATE TABLE", schema_exists=True)
    with pytest.raises(ConfigError, match=r"cannot create table main\.lab\.rows: .*needs CREATE TABLE and USE SCHEMA"):
        tables.create(session, "main.lab.rows", tables.ADATA_ROWS)
    assert not any("CREATE SCHEMA" in statement for statement in session.said)


def test_without_create_model_the_right_is_named(monkeypatch, tmp_path):
    def start_run(**arguments):
        raise MlflowException("User does not have CREATE MODEL on Schema 'main.lab'.", PERMISSION_DENIED)

    monkeypatch.setattr(mlflow, "start_run", start_run)
    with mlflow_store(tmp_path), pytest.raises(ConfigError, match=r"does not have CREATE MODEL.*It needs CREATE MODEL"):
        register.register(str(GOLDEN / "checkpoint_flash"), "scgpt")

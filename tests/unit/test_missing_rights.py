"""What commands say if the principal lacks a right in Unity Catalog, or its model gets a deployment job."""

import pytest

from scgpt_batch.errors import ConfigError
from scgpt_batch.registry import register
from scgpt_batch.spark import tables
from tests.databricks_workspace import Workspace, served
from tests.helpers import mlflow_store
from tests.paths import GOLDEN

MODEL = "main.lab.scgpt"


@pytest.fixture
def workspace(monkeypatch, tmp_path):
    """A workspace with the schema main.lab; the model registry is its Unity Catalog, and runs are kept locally."""
    monkeypatch.setattr(tables, "_found_in_warehouse", lambda spark, table: False)  # the catalog is persistent
    with mlflow_store(tmp_path), served(Workspace(schemas={"main.lab"}), monkeypatch, tmp_path) as stand_in:
        monkeypatch.setenv("MLFLOW_REGISTRY_URI", "databricks-uc")
        yield stand_in


def make(**given):
    return register.register(str(GOLDEN / "checkpoint_flash"), MODEL, **given)


def test_without_create_schema_the_right_is_named(workspace):
    workspace.lacking, workspace.schemas = {"CREATE SCHEMA"}, set()
    with pytest.raises(ConfigError, match=r"cannot create schema main\.lab: .*needs CREATE SCHEMA and USE CATALOG"):
        tables.create(workspace.sql(), "main.lab.rows", tables.ADATA_ROWS)


def test_existing_schema_needs_no_right_to_create_it(workspace):
    workspace.lacking = {"CREATE SCHEMA"}
    tables.create(workspace.sql(), "main.lab.rows", tables.ADATA_ROWS)
    assert workspace.tables == {"main.lab.rows"}


def test_without_create_table_the_right_is_named(workspace):
    workspace.lacking = {"CREATE TABLE"}
    with pytest.raises(ConfigError, match=r"cannot create table main\.lab\.rows: .*needs CREATE TABLE and USE SCHEMA"):
        tables.create(workspace.sql(), "main.lab.rows", tables.ADATA_ROWS)


def test_without_create_model_the_right_is_named(workspace):
    workspace.lacking = {"CREATE MODEL"}
    with pytest.raises(ConfigError, match=r"does not have CREATE MODEL on Schema 'main\.lab'.*It needs CREATE MODEL"):
        make()
    assert workspace.models == {}


def test_without_a_right_to_an_existing_model_the_right_is_named(workspace):
    workspace.add_model(MODEL, 1)
    workspace.lacking = {"CREATE MODEL VERSION"}
    with pytest.raises(ConfigError, match=r"does not have CREATE MODEL VERSION.*an existing model needs MANAGE"):
        make()


@pytest.mark.parametrize("exists", [False, True])
def test_model_has_its_deployment_job_before_the_new_version(workspace, exists):
    if exists:
        workspace.add_model(MODEL, 1)
    workspace.lacking = {"CREATE MODEL VERSION"}  # the version itself needs the cloud's storage
    with pytest.raises(ConfigError, match="CREATE MODEL VERSION"):
        make(deployment_job="123")
    assert workspace.models[MODEL]["deployment_job_id"] == "123"


def test_deployment_job_needs_unity_catalog(tmp_path):
    with mlflow_store(tmp_path), pytest.raises(ConfigError, match=r"sqlite.*use --registry-uri databricks-uc"):
        make(deployment_job="123")

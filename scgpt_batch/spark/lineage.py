"""The input table of a run, for MLflow: catalogs show it as the run's lineage."""

from typing import Any

import mlflow
from mlflow.data.delta_dataset_source import DeltaDatasetSource
from mlflow.data.meta_dataset import MetaDataset

from scgpt_batch.io.locations import delta_path
from scgpt_batch.spark.session import on_databricks


class InputTable(DeltaDatasetSource):
    """A Delta table that a run read. It differs from its base class in that version 0 is kept, too.

    Elsewhere than on Databricks, MLflow would take a table's name for one of Unity Catalog and ask a workspace for it.
    """

    def to_dict(self) -> dict[Any, Any]:
        """Return what MLflow stores: the path or the name, and the version; none for a view."""
        table = {"path": self.path} if self.path else {"delta_table_name": self.delta_table_name}
        known = super().to_dict() if on_databricks() else table
        return known | ({} if self.delta_table_version is None else {"delta_table_version": self.delta_table_version})


def log_input(table: str, version: int | None) -> None:
    """Log an input table, and the version of it that is read, to the active MLflow run."""
    path = delta_path(table)
    source = InputTable(path=path, delta_table_name=None if path else table, delta_table_version=version)
    mlflow.log_input(MetaDataset(source, name=table), context="embed")

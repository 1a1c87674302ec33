"""The MLflow experiment that runs and models are logged to."""

from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException


def use_experiment(name: str) -> None:
    """Select an MLflow experiment, which is created if it does not exist.

    With a tracking store in sqlite, a new experiment stores its files beside the database instead of MLflow's default
    `./mlruns`.
    """
    uri = mlflow.get_tracking_uri()
    if uri.startswith("sqlite:///") and mlflow.get_experiment_by_name(name) is None:
        artifacts = Path(uri.removeprefix("sqlite:///")).resolve().with_name("artifacts")
        try:
            mlflow.create_experiment(name, artifacts.as_uri())
        except MlflowException:
            if mlflow.get_experiment_by_name(name) is None:  # not created by another run in the meantime
                raise
    mlflow.set_experiment(name)

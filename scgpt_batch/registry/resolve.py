"""Find a registered model or a path, and fetch its files: an alias becomes the version it points to now."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mlflow
import yaml
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import get_or_create_nfs_tmp_dir, get_or_create_tmp_dir
from mlflow.utils.nfs_on_spark import get_nfs_cache_root_dir

from scgpt_batch.errors import ConfigError
from scgpt_batch.inference.engine import Embedder
from scgpt_batch.models.scgpt import (
    ModelConfig,
    Vocabulary,
)

# The extra that brings a library by which MLflow reads and writes the files of a model in Unity Catalog.
STORAGE_EXTRAS = {"boto3": "databricks-aws", "azure": "databricks-azure", "google": "databricks-gcp"}


@dataclass(frozen=True)
class ResolvedModel:
    """One version of a model, alias resolved: what a run loads, stamps and logs.

    Attributes
    ----------
    uri
        `models:/name/version`, or the path it was given as.
    name, version
        Of the registered model; of a path, the folder's name and the checkpoint's digest (12 digits).
    folder, checkpoint
        Where the model's files, and of these its checkpoint, lie on this machine.
    digest
        Of the checkpoint.
    """

    uri: str
    name: str
    version: str
    folder: Path
    checkpoint: Path
    digest: str

    @property
    def config(self) -> ModelConfig:
        """The model's shape, from its args.json; no weights are read."""
        return ModelConfig.from_args(json.loads((self.checkpoint / "args.json").read_text()))

    @property
    def vocabulary(self) -> Vocabulary:
        """The model's gene vocabulary, from its vocab.json."""
        return Vocabulary.from_file(self.checkpoint / "vocab.json")


def resolve(model_uri: str, *, into: str | None = None) -> ResolvedModel:
    """Find a model and fetch its files: an alias becomes the version it stands for now.

    Parameters
    ----------
    into
        Folder to fetch the files of a registered version into; None: they are read where MLflow keeps them on this
        machine, else fetched into a folder that is removed when the process exits.

    Raises
    ------
    ConfigError
        There is no such model, version, alias or path, or it is no model of this package.
    """
    try:
        name, version = _name_and_version(model_uri)
        uri = f"models:/{name}/{version}" if version else model_uri
        folder = Path(_fetched(name, version, into) if name and version else _existing_folder(model_uri))
        flavor = mlflow.models.Model.load(str(folder)).flavors["python_function"]
        checkpoint = folder / flavor["artifacts"]["checkpoint"]["path"]
        digest = flavor["config"]["checkpoint_digest"]
    except (MlflowException, ImportError) as exc:
        why = _explained(exc)
        raise ConfigError(f"no model at {model_uri} in {mlflow.get_registry_uri()}: {why}") from exc
    except (KeyError, TypeError, AttributeError, OSError, yaml.YAMLError) as exc:
        why = " ".join(str(exc).split())  # YAML's complaints have several lines
        raise ConfigError(f"{model_uri} is no model that scgpt-batch register made: {why}") from exc
    return ResolvedModel(uri, name or folder.name, version or digest[:12], folder, checkpoint, digest)


def _fetched(name: str, version: str, into: str | None) -> str:
    """Return the folder with a version's files: MLflow's own if it is on this machine, else one to fetch them into."""
    in_place = not into and not get_nfs_cache_root_dir() and _is_stored_here(name, version)
    folder = None if in_place else into or _temporary_folder()
    return mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=folder)


def _is_stored_here(name: str, version: str) -> bool:
    """Whether MLflow keeps a version's files in a folder of this machine."""
    if mlflow.get_registry_uri().startswith("databricks"):
        return False
    client = mlflow.MlflowClient()
    place = client.get_model_version_download_uri(name, version)
    if place.startswith("models:/"):  # the logged model that was registered
        place = client.get_logged_model(place.removeprefix("models:/")).artifact_location
    return urlparse(place).scheme in ("", "file")


def _temporary_folder() -> str:
    """Make a folder that MLflow removes when this process exits, or when the Databricks notebook is detached.

    It is in the folder that all machines of the cluster share, if there is one. `mlflow.pyfunc.spark_udf` uses that,
    too: Databricks has one on each classic cluster, and gives Spark's workers no credentials to fetch for themselves;
    other clusters name theirs by `spark.mlflow.nfs.rootDir`.
    """
    root = get_or_create_nfs_tmp_dir() if get_nfs_cache_root_dir() else get_or_create_tmp_dir()
    folder = Path(tempfile.mkdtemp(dir=root))
    folder.chmod(0o755)  # workers may be another user
    return str(folder)


def load(model: ResolvedModel | str) -> Embedder:
    """Load a model through MLflow and return its embedder; the weights are loaded once per process."""
    place = model if isinstance(model, str) else str(model.folder)
    python_model: Any = mlflow.pyfunc.load_model(place).unwrap_python_model()
    return python_model.embedder


def _name_and_version(model_uri: str) -> tuple[str | None, str | None]:
    """Split `models:/name/version` or `models:/name@alias`; (None, None) for a path."""
    if not model_uri.startswith("models:/"):
        return None, None
    name = model_uri.removeprefix("models:/")
    if "@" in name:
        name, alias = name.rsplit("@", 1)
        return name, str(mlflow.MlflowClient().get_model_version_by_alias(name, alias).version)
    name, _, version = name.rpartition("/")
    if not name or not version.isdigit():
        raise ConfigError(f"{model_uri!r} is no model URI: use models:/name/version, models:/name@alias or a path")
    return name, version


def _existing_folder(path: str) -> str:
    if not (Path(path) / "MLmodel").is_file():
        raise ConfigError(f"no MLflow model at {path!r}: use models:/name/version, models:/name@alias or a path")
    return path


def _explained(exc: MlflowException | ImportError) -> str:
    """Return the message of an error of MLflow; of a missing storage library: what to install."""
    error: BaseException | None = exc
    while error is not None:
        library = (getattr(error, "name", None) or "").split(".")[0]
        if isinstance(error, ImportError) and library in STORAGE_EXTRAS:
            extra = f"scgpt_batch[{STORAGE_EXTRAS[library]}]"
            return f"the library of the cloud's storage is not installed ({error}); pip install '{extra}'"
        error = error.__cause__
    return str(getattr(exc, "message", exc))

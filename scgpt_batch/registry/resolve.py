"""Resolving a model URI or path to one version of a model, and loading it."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import mlflow
import yaml
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import get_or_create_nfs_tmp_dir, get_or_create_tmp_dir
from mlflow.utils.nfs_on_spark import get_nfs_cache_root_dir

from scgpt_batch.errors import ConfigError, install
from scgpt_batch.io.locations import local_path
from scgpt_batch.models.scgpt.config import ModelConfig
from scgpt_batch.models.scgpt.vocabulary import Vocabulary

if TYPE_CHECKING:  # it imports torch, for seconds, which a version can be resolved without
    from scgpt_batch.inference.engine import Embedder

# Libraries that MLflow needs for the files of models in Unity Catalog, and the extras that install them.
STORAGE_EXTRAS = {"boto3": "databricks-aws", "azure": "databricks-azure", "google": "databricks-gcp"}


@dataclass(frozen=True)
class ResolvedModel:
    """One version of a model, with its files on this machine.

    Attributes
    ----------
    uri
        `models:/name/version`, or the path.
    name, version
        Name and version of the registered model; for a path, the name of the folder and 12 digits of the digest.
    folder, checkpoint
        Folder with the model's files, and its subfolder with the checkpoint.
    digest
        Digest of the checkpoint.
    """

    uri: str
    name: str
    version: str
    folder: Path
    checkpoint: Path
    digest: str

    @property
    def config(self) -> ModelConfig:
        """The dimensions of the model, read from args.json."""
        return ModelConfig.from_args(json.loads((self.checkpoint / "args.json").read_text()))

    @property
    def vocabulary(self) -> Vocabulary:
        """The gene vocabulary, read from vocab.json."""
        return Vocabulary.from_file(self.checkpoint / "vocab.json")


def resolve(model_uri: str, *, into: str | None = None) -> ResolvedModel:
    """Return the version that a URI refers to, with its files on this machine. An alias is resolved to a version.

    Parameters
    ----------
    model_uri
        `models:/name/version`, `models:/name@alias`, or the path of an MLflow model.
    into
        Folder to download the files of a registered version to. Default: the files are used in place if MLflow stores
        them on this machine, else downloaded to a folder that is removed when the process exits.

    Raises
    ------
    ConfigError
        The model, version, alias or path does not exist, or the model was not registered by this package.

    Examples
    --------
    >>> model = resolve("models:/scgpt@champion")
    >>> model.version
    '1'
    >>> embedder = load(model)
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
        raise ConfigError(f"there is no model {model_uri} in {mlflow.get_registry_uri()}: {why}") from exc
    except (KeyError, TypeError, AttributeError, OSError, yaml.YAMLError) as exc:
        why = " ".join(str(exc).split())  # YAML errors have several lines
        raise ConfigError(f"{model_uri} was not registered by scgpt-batch register ({why}); register it first") from exc
    return ResolvedModel(uri, name or folder.name, version or digest[:12], folder, checkpoint, digest)


def _fetched(name: str, version: str, into: str | None) -> str:
    """Return the folder with the files of a version: MLflow's own if it is on this machine, else a download."""
    in_place = not into and not get_nfs_cache_root_dir() and _is_stored_here(name, version)
    folder = None if in_place else into or _temporary_folder()
    return mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=folder)


def _is_stored_here(name: str, version: str) -> bool:
    """Return whether MLflow stores the files of a version in a folder on this machine."""
    if mlflow.get_registry_uri().startswith("databricks"):
        return False
    client = mlflow.MlflowClient()
    place = client.get_model_version_download_uri(name, version)
    if place.startswith("models:/"):  # URI of the logged model
        place = client.get_logged_model(place.removeprefix("models:/")).artifact_location
    return urlparse(place).scheme in ("", "file")


def _temporary_folder() -> str:
    """Return a new folder that MLflow removes when this process exits, or when the Databricks notebook is detached.

    If the cluster has a shared folder, it is created there, as `mlflow.pyfunc.spark_udf` does. Classic Databricks
    clusters have one, because their Spark workers have no credentials to download files; on other clusters
    `spark.mlflow.nfs.rootDir` names it.
    """
    root = get_or_create_nfs_tmp_dir() if get_nfs_cache_root_dir() else get_or_create_tmp_dir()
    folder = Path(tempfile.mkdtemp(dir=root))
    folder.chmod(0o755)  # Spark workers may run as another user
    return str(folder)


def load(model: ResolvedModel | str) -> "Embedder":
    """Return the embedder of a model, loaded through MLflow; the weights are loaded once per process."""
    place = model if isinstance(model, str) else str(model.folder)
    python_model: Any = mlflow.pyfunc.load_model(place).unwrap_python_model()
    return python_model.embedder


def _name_and_version(model_uri: str) -> tuple[str | None, str | None]:
    """Return name and version of a `models:/` URI, with an alias resolved; (None, None) for a path."""
    if not model_uri.startswith("models:/"):
        return None, None
    name = model_uri.removeprefix("models:/")
    if "@" in name:
        name, alias = name.rsplit("@", 1)
        return name, str(mlflow.MlflowClient().get_model_version_by_alias(name, alias).version)
    name, _, version = name.rpartition("/")
    if not name or not version.isdigit():
        raise ConfigError(f"{model_uri!r} is not a model URI: use models:/name/version, models:/name@alias or a path")
    return name, version


def _existing_folder(path: str) -> str:
    folder = local_path(path, "model")
    if not (folder / "MLmodel").is_file():
        raise ConfigError(
            f"there is no MLflow model at {path!r}: use models:/name/version, models:/name@alias or a path"
        )
    return str(folder)


def _explained(exc: MlflowException | ImportError) -> str:
    """Return the message of an MLflow error; if a storage library is missing, what to install."""
    error: BaseException | None = exc
    while error is not None:
        library = (getattr(error, "name", None) or "").split(".")[0]
        if isinstance(error, ImportError) and library in STORAGE_EXTRAS:
            how = install(STORAGE_EXTRAS[library])
            return f"the library for the cloud storage is not installed ({error}); {how}"
        error = error.__cause__
    return str(getattr(exc, "message", exc))

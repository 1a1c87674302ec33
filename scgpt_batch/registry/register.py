"""Logging and registering the model in MLflow; the URIs select sqlite, a tracking server or Unity Catalog."""

import json
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import convert_input_example_to_serving_input, validate_serving_input
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

import scgpt_batch
from scgpt_batch.errors import CheckpointError, ConfigError
from scgpt_batch.io.locations import local_path
from scgpt_batch.io.rows import PAYLOAD_COLUMNS, table_to_json
from scgpt_batch.models.scgpt.checkpoint import Checkpoint, checkpoint_digest, load_checkpoint
from scgpt_batch.models.scgpt.vocabulary import SPECIAL_TOKENS
from scgpt_batch.registry.resolve import (
    ResolvedModel,
    _explained,
    resolve,
)
from scgpt_batch.registry.sample_answers import (
    SAMPLE,
    public_version,
    stored_answers,
)
from scgpt_batch.registry.signature import signature

logger = logging.getLogger(__name__)

# Packages that an endpoint or another cluster installs to run the model; never pyspark, which clusters bring.
REQUIREMENTS = (
    "anndata", "mlflow", "numpy", "pandas", "pyarrow", "pydantic", "safetensors", "scanpy", "scikit-misc", "scipy",
    "torch",
)  # fmt: skip


BROUGHT_BY_CLUSTERS = ("pyspark", "delta-spark")


def register(
    checkpoint: str,
    name: str,
    *,
    alias: str = "",
    input_roots: Sequence[str] = (),
    requirements: Sequence[str] = (),
    deployment_job: str = "",
) -> ResolvedModel:
    """Register a checkpoint as a new model version, with its code, schema and model card.

    Before it is registered, the logged model must answer an example request, as a server would send it.

    Parameters
    ----------
    checkpoint
        A checkpoint folder in the published layout.
    name
        Name of the registered model; in Unity Catalog `catalog.schema.name`.
    alias
        Alias to set on the new version, such as "champion".
    input_roots
        Folders below which `input_data_path` may name files. Default: none.
    requirements
        Packages that endpoints install instead of the versions that are installed here, such as "torch==2.9.1". An
        endpoint needs a torch build that its NVIDIA driver supports.
    deployment_job
        Id of the Databricks job that Unity Catalog starts for each new version of the model, this one included.

    Raises
    ------
    CheckpointError
        The checkpoint cannot be used. Nothing has been logged.
    ConfigError
        The name, alias, deployment job or a requirement is invalid (nothing has been logged), or MLflow cannot be
        reached.

    Examples
    --------
    >>> model = register("checkpoints/scgpt-human", "scgpt", alias="champion")
    >>> model.uri
    'models:/scgpt/1'
    """
    _check_name(name, alias)
    _check_deployment_job(deployment_job)
    packages = pip_requirements(requirements)
    folder = local_path(checkpoint, "checkpoint").resolve()
    roots = [str(local_path(root, "input root").resolve()) for root in input_roots]
    loaded = load_checkpoint(folder)
    example = (_example_rows(loaded), {"need_preprocess": False})
    card = model_card(loaded, folder.name)
    facts = _facts(loaded)
    try:
        with mlflow.start_run(run_name=f"register {name}", tags=facts) as run, tempfile.TemporaryDirectory() as here:
            files = _layout_files(loaded, Path(here) / "files" / folder.name)
            sample = Path(here) / SAMPLE
            sample.write_text(json.dumps(stored_answers(loaded)), encoding="utf-8")
            mlflow.log_text(card, "model_card.md")
            mlflow.log_params({k: v for k, v in facts.items() if k != "checkpoint_digest"})
            info = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(__file__).with_name("model_file.py")),
                artifacts={"checkpoint": str(files), "sample": str(sample)},
                code_paths=[str(Path(scgpt_batch.__file__).parent)],
                signature=signature(),
                input_example=example,
                pip_requirements=packages,
                model_config={
                    "checkpoint_digest": loaded.digest,
                    "input_roots": roots,
                },
                metadata=facts,
            )
        logger.info("logged %s; checking that it answers an example request", info.model_uri)
        with warnings.catch_warnings():
            # deprecated for mlflow.models.predict, which would build an environment for the check
            warnings.simplefilter("ignore", FutureWarning)
            validate_serving_input(info.model_uri, convert_input_example_to_serving_input(example))
        if deployment_job:
            _connect(name, deployment_job)
        version = mlflow.register_model(info.model_uri, name, tags=facts | {"run_id": run.info.run_id})
        client = mlflow.MlflowClient()
        client.update_model_version(name, version.version, description=card)
        if alias:
            client.set_registered_model_alias(name, alias, version.version)
    except (MlflowException, ImportError) as exc:
        why = _explained(exc)
        if getattr(exc, "error_code", "") == "PERMISSION_DENIED":
            why += ". It needs CREATE MODEL and USE SCHEMA on the schema; an existing model needs MANAGE, or its owner"
        raise ConfigError(f"MLflow did not register {name!r} at {mlflow.get_registry_uri()}: {why}") from exc
    return resolve(f"models:/{name}/{version.version}")


def _connect(name: str, deployment_job: str) -> None:
    """Make a job the deployment job of a registered model, which is created if it does not exist."""
    client = mlflow.MlflowClient()
    try:
        client.create_registered_model(name, deployment_job_id=deployment_job)
    except MlflowException as exc:
        if exc.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise
        client.update_registered_model(name, deployment_job_id=deployment_job)
    logger.info("new versions of %s start the job %s", name, deployment_job)


def pip_requirements(given: Sequence[str]) -> list[str]:
    """Return the requirements of an endpoint: the installed versions of `REQUIREMENTS`, or those that are given.

    Raises
    ------
    ConfigError
        One is not a requirement, or is a package that the cluster brings.
    """
    packages = {package: f"{package}=={public_version(package)}" for package in REQUIREMENTS}
    for text in given:
        try:
            package = canonicalize_name(Requirement(text).name)
        except InvalidRequirement as exc:
            message = f"{text!r} is not a requirement: use PACKAGE==VERSION, or PACKAGE @ URL of a wheel"
            raise ConfigError(message) from exc
        if package in BROUGHT_BY_CLUSTERS:
            raise ConfigError(f"requirement {text!r}: clusters bring their own {package}; leave it out")
        if packages.get(package, text) != text:
            logger.warning("endpoints install %s; this registration is checked with %s", text, packages[package])
        packages[package] = text
    return list(packages.values())


def _layout_files(checkpoint: Checkpoint, folder: Path) -> Path:
    """Copy the three files of a checkpoint into a new folder, so that no other files beside them are logged."""
    folder.mkdir(parents=True)
    for name in ("args.json", "vocab.json", checkpoint.weights.name):
        source = (checkpoint.folder / name).resolve()
        try:
            (folder / name).hardlink_to(source)  # weights can be gigabytes
        except OSError:  # another file system
            shutil.copyfile(source, folder / name)
    if checkpoint_digest(folder) != checkpoint.digest:
        raise CheckpointError(f"the files in {checkpoint.folder} changed while they were read; register it again")
    return folder


def model_card(checkpoint: Checkpoint, source: str) -> str:
    """Return the model card in Markdown.

    Parameters
    ----------
    checkpoint
        The checkpoint.
    source
        Name of the checkpoint to show.
    """
    config = checkpoint.config
    return f"""# scGPT embeddings

Gene and cell embeddings of single-cell counts, computed by the scGPT encoder (Cui et al. 2024, Nature Methods) from
rows of serialized AnnData. Numerically equivalent to scgpt 0.2.4 in evaluation mode.

| | |
|---|---|
| checkpoint | {source}, SHA-256 {checkpoint.digest} |
| tensors | loaded {len(checkpoint.tensors)} of {len(checkpoint.tensors)}; not used: {len(checkpoint.ignored)} |
| embedding dimensions | {config.embsize} |
| layers | {config.nlayers} |
| attention heads | {config.nheads} |
| feed-forward width | {config.d_hid} |
| vocabulary | {len(checkpoint.vocabulary)} tokens |
| registered by | scgpt_batch {scgpt_batch.__version__} |

| mode | result |
|---|---|
| `static` | The gene's vector in the embedding table, independent of your cells. |
| `contextual` | The gene's vector inside your cells (transformer output), averaged over the cells that express it. |
| `cell` | One vector for each cell (output of the `<cls>` token), normalised to length 1. |

Genes are matched to the vocabulary by symbol. The column `coverage` is the share of a row's counts in matched genes.
"""


def _facts(checkpoint: Checkpoint) -> dict[str, str]:
    config = checkpoint.config
    return {
        "checkpoint_digest": checkpoint.digest,
        "tensors_loaded": f"{len(checkpoint.tensors)} of {len(checkpoint.tensors)}",
        "embsize": str(config.embsize),
        "nlayers": str(config.nlayers),
        "nheads": str(config.nheads),
        "vocabulary_size": str(len(checkpoint.vocabulary)),
        "package_version": scgpt_batch.__version__,
    }


def _example_rows(checkpoint: Checkpoint) -> pd.DataFrame:
    """Return two small rows with genes of the vocabulary, one in each format."""
    genes = [token for token in checkpoint.vocabulary.tokens if token not in SPECIAL_TOKENS][:4]
    var = table_to_json(pd.DataFrame(index=genes))
    obs = table_to_json(pd.DataFrame(index=["cell1", "cell2"]))
    dense = [[1.0] * len(genes), [2.0] + [0.0] * (len(genes) - 1)]
    csr = {"x_data": [1.0, 2.0], "x_indices": [0, 0], "x_indptr": [0, 1, 2]}
    rows: list[dict[str, Any]] = [{"adata_sparsematrix": dense}, csr]
    frame = pd.DataFrame([dict.fromkeys(PAYLOAD_COLUMNS) | row | {"adata_obs": obs, "adata_var": var} for row in rows])
    return frame.astype(object).where(frame.notna(), None)


def _check_deployment_job(job: str) -> None:
    registry = mlflow.get_registry_uri()
    if job and not registry.startswith("databricks-uc"):
        raise ConfigError(
            f"--deployment-job needs Unity Catalog, which starts the job; the registry is {registry}: "
            "use --registry-uri databricks-uc"
        )


def _check_name(name: str, alias: str) -> None:
    """Check name and alias by the rules of the registry, before anything is logged."""
    registry = mlflow.get_registry_uri()
    if registry.startswith("databricks-uc"):
        if not re.fullmatch(r"[^./\s]+\.[^./\s]+\.[^./\s]+", name):
            raise ConfigError(f"{name!r} cannot be registered in Unity Catalog: use catalog.schema.name")
    elif not name.strip(" .") or set(name) & set("/:"):
        raise ConfigError(
            f"{name!r} cannot be the name of a registered model in {registry}: it must not be empty or contain / or :"
        )
    reserved = alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias)
    if alias and (reserved or not re.fullmatch(r"[\w-]+", alias, re.ASCII)):
        raise ConfigError(
            f"{alias!r} cannot be an alias: use letters, digits, - and _, but not 'latest' or 'v' with a number"
        )

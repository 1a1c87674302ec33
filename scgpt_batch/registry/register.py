"""Log, register and find the model in MLflow: sqlite, a tracking server or Unity Catalog, by URI alone."""

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

import scgpt_batch
from scgpt_batch.errors import CheckpointError, ConfigError
from scgpt_batch.io.rows import PAYLOAD_COLUMNS, table_to_json
from scgpt_batch.models.scgpt import (
    SPECIAL_TOKENS,
    Checkpoint,
    checkpoint_digest,
    load_checkpoint,
)
from scgpt_batch.registry.resolve import (
    ResolvedModel,
    _explained,
    resolve,
)
from scgpt_batch.registry.sample_answers import (
    SAMPLE,
    _public_version,
    _stored_answers,
)
from scgpt_batch.registry.signature import signature

logger = logging.getLogger(__name__)

# What an endpoint or a foreign cluster installs to run the model; pyspark is never among it.
REQUIREMENTS = (
    "anndata", "mlflow", "numpy", "pandas", "pyarrow", "pydantic", "safetensors", "scanpy", "scikit-misc", "scipy",
    "torch",
)  # fmt: skip


def register(checkpoint: str, name: str, *, alias: str = "", input_roots: Sequence[str] = ()) -> ResolvedModel:
    """Log the model with its code, signature and card, check that it serves, then register it.

    Parameters
    ----------
    checkpoint
        A folder in the published layout.
    name
        Registered model: `name`, or `catalog.schema.name` in Unity Catalog.
    alias
        Set on the new version, such as `champion`.
    input_roots
        Folders below which `input_data_path` may read; by default none.

    Raises
    ------
    CheckpointError
        The checkpoint cannot be used; nothing is logged.
    ConfigError
        The name or alias is none that the registry takes, and nothing is logged; or MLflow cannot be reached.
    """
    _check_name(name, alias)
    loaded = load_checkpoint(checkpoint)
    folder = Path(checkpoint).resolve()
    example = (_example_rows(loaded), {"need_preprocess": False})
    card = model_card(loaded, folder.name)
    facts = _facts(loaded)
    try:
        with mlflow.start_run(run_name=f"register {name}", tags=facts) as run, tempfile.TemporaryDirectory() as here:
            files = _layout_files(loaded, Path(here) / "files" / folder.name)
            sample = Path(here) / SAMPLE
            sample.write_text(json.dumps(_stored_answers(loaded)), encoding="utf-8")
            mlflow.log_text(card, "model_card.md")
            mlflow.log_params({k: v for k, v in facts.items() if k != "checkpoint_digest"})
            info = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(__file__).with_name("model_file.py")),
                artifacts={"checkpoint": str(files), "sample": str(sample)},
                code_paths=[str(Path(scgpt_batch.__file__).parent)],
                signature=signature(),
                input_example=example,
                pip_requirements=[f"{package}=={_public_version(package)}" for package in REQUIREMENTS],
                model_config={
                    "checkpoint_digest": loaded.digest,
                    "input_roots": [str(Path(root).resolve()) for root in input_roots],
                },
                metadata=facts,
            )
        logger.info("logged %s; checking that it answers as a server would be asked", info.model_uri)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its successor builds an environment for the check
            validate_serving_input(info.model_uri, convert_input_example_to_serving_input(example))
        version = mlflow.register_model(info.model_uri, name, tags=facts | {"run_id": run.info.run_id})
        client = mlflow.MlflowClient()
        client.update_model_version(name, version.version, description=card)
        if alias:
            client.set_registered_model_alias(name, alias, version.version)
    except (MlflowException, ImportError) as exc:
        why = _explained(exc)
        raise ConfigError(f"MLflow did not register {name!r} at {mlflow.get_registry_uri()}: {why}") from exc
    return resolve(f"models:/{name}/{version.version}")


def _layout_files(checkpoint: Checkpoint, folder: Path) -> Path:
    """Lay the three files of a checkpoint into a new folder: nothing else that lies beside them is logged."""
    folder.mkdir(parents=True)
    for name in ("args.json", "vocab.json", checkpoint.weights.name):
        source = (checkpoint.folder / name).resolve()
        try:
            (folder / name).hardlink_to(source)  # weights can be gigabytes
        except OSError:  # another file system
            shutil.copyfile(source, folder / name)
    if checkpoint_digest(folder) != checkpoint.digest:
        raise CheckpointError(f"{checkpoint.folder} has changed since it was read: register it again")
    return folder


def use_experiment(name: str) -> None:
    """Log to an MLflow experiment, which is created if it is missing.

    A store in sqlite keeps the files of new experiments beside the database; MLflow's own default is `./mlruns`.
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


def model_card(checkpoint: Checkpoint, source: str) -> str:
    """Describe the model in Markdown: what it is, from which weights, of which size."""
    config = checkpoint.config
    return f"""# scGPT embeddings

Gene and cell embeddings of single-cell counts by the scGPT encoder (Cui et al. 2024, Nature Methods), for rows of
serialized AnnData. Numbers are those of upstream scgpt 0.2.4 in evaluation mode.

| | |
|---|---|
| checkpoint | {source}, SHA-256 {checkpoint.digest} |
| tensors | loaded {len(checkpoint.tensors)} of {len(checkpoint.tensors)}; not used: {len(checkpoint.ignored)} |
| embedding width d | {config.embsize} |
| layers, heads, feed-forward width | {config.nlayers}, {config.nheads}, {config.d_hid} |
| vocabulary | {len(checkpoint.vocabulary)} tokens |
| made by | scgpt_batch {scgpt_batch.__version__} |

Modes: `static` (the vocabulary's vector of a gene), `contextual` (the transformer's output for a gene, averaged over
cells), `cell` (the `<cls>` output, L2-normalised). Gene names are matched exactly.
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
    """Two small rows, one in each format, of genes that the vocabulary holds."""
    genes = [token for token in checkpoint.vocabulary.tokens if token not in SPECIAL_TOKENS][:4]
    var = table_to_json(pd.DataFrame(index=genes))
    obs = table_to_json(pd.DataFrame(index=["cell1", "cell2"]))
    dense = [[1.0] * len(genes), [2.0] + [0.0] * (len(genes) - 1)]
    csr = {"x_data": [1.0, 2.0], "x_indices": [0, 0], "x_indptr": [0, 1, 2]}
    rows: list[dict[str, Any]] = [{"adata_sparsematrix": dense}, csr]
    frame = pd.DataFrame([dict.fromkeys(PAYLOAD_COLUMNS) | row | {"adata_obs": obs, "adata_var": var} for row in rows])
    return frame.astype(object).where(frame.notna(), None)


def _check_name(name: str, alias: str) -> None:
    """Refuse what the registry would refuse, before anything is logged (ConfigError)."""
    where = mlflow.get_registry_uri()
    if where.startswith("databricks-uc"):
        if not re.fullmatch(r"[^./\s]+\.[^./\s]+\.[^./\s]+", name):
            raise ConfigError(f"{name!r} cannot be registered in Unity Catalog: give catalog.schema.name")
    elif not name.strip(" .") or set(name) & set("/:"):
        raise ConfigError(f"{name!r} cannot be the name of a registered model in {where}: no /, no :, not empty")
    reserved = alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias)
    if alias and (reserved or not re.fullmatch(r"[\w-]+", alias, re.ASCII)):
        raise ConfigError(f"{alias!r} cannot be an alias: letters, digits, - and _; not latest, nor v and a number")

"""Log, register and find the model in MLflow: sqlite, a tracking server or Unity Catalog, by URI alone."""

import json
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import convert_input_example_to_serving_input, validate_serving_input
from mlflow.utils.file_utils import get_or_create_nfs_tmp_dir
from mlflow.utils.nfs_on_spark import get_nfs_cache_root_dir

import scgpt_batch
from scgpt_batch import pyfunc
from scgpt_batch.anndata_rows import PAYLOAD_COLUMNS, table_to_json
from scgpt_batch.answers import unpacked
from scgpt_batch.embedder import Embedder, load_embedder
from scgpt_batch.errors import CheckpointError, ConfigError
from scgpt_batch.model import SPECIAL_TOKENS, Checkpoint, ModelConfig, Vocabulary, checkpoint_digest, load_checkpoint
from scgpt_batch.parameters import Parameters

logger = logging.getLogger(__name__)

# What an endpoint or a foreign cluster installs to run the model; pyspark is never among it.
REQUIREMENTS = (
    "anndata", "mlflow", "numpy", "pandas", "pyarrow", "pydantic", "safetensors", "scanpy", "scikit-misc", "scipy",
    "torch",
)  # fmt: skip

# The extra that brings a library by which MLflow reads and writes the files of a model in Unity Catalog.
STORAGE_EXTRAS = {"boto3": "databricks-aws", "azure": "databricks-azure", "google": "databricks-gcp"}

SAMPLE = "sample.json"
SAMPLE_TOLERANCE = 1e-5  # of a number in its answers, in float32 on any CPU
# What the sample is asked when a version is registered, and again when it is promoted: every mode, and preprocessing.
_BINS_ONLY = {"need_preprocess": False, "encoding": "float32_base64"}
_PREPROCESSED = {"data_is_raw": True, "log1p": True, "subset_hvg": 0, "encoding": "float32_base64"}
SAMPLE_CASES: tuple[dict[str, Any], ...] = (
    *({"mode": mode, **_BINS_ONLY} for mode in ("static", "contextual", "cell")),
    {"mode": "cell", **_PREPROCESSED},
)


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
                python_model=pyfunc.__file__,
                artifacts={"checkpoint": str(files), "sample": str(sample)},
                code_paths=[str(Path(scgpt_batch.__file__).parent)],
                signature=pyfunc.signature(),
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


def resolve(model_uri: str, *, into: str | None = None) -> ResolvedModel:
    """Find a model and fetch its files: an alias becomes the version it stands for now.

    Parameters
    ----------
    into
        Folder to fetch the files of a registered version into; None: where MLflow keeps them.

    Raises
    ------
    ConfigError
        There is no such model, version, alias or path, or it is no model of this package.
    """
    try:
        name, version = _name_and_version(model_uri)
        uri = f"models:/{name}/{version}" if version else model_uri
        folder = Path(_fetched(uri, into) if version else _existing_folder(model_uri))
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


def _fetched(uri: str, into: str | None) -> str:
    """Fetch a version's files: to the folder that all machines of the cluster share, where there is one.

    There `mlflow.pyfunc.spark_udf` puts them too: Databricks has one on each classic cluster, and gives Spark's workers
    no credentials to fetch for themselves; other clusters name theirs by `spark.mlflow.nfs.rootDir`.
    """
    if into or not get_nfs_cache_root_dir():
        return mlflow.artifacts.download_artifacts(uri, dst_path=into)
    folder = Path(tempfile.mkdtemp(dir=get_or_create_nfs_tmp_dir()))
    folder.chmod(0o755)  # workers may be another user
    return mlflow.artifacts.download_artifacts(uri, dst_path=str(folder))


def load(model: ResolvedModel | str) -> Embedder:
    """Load a model through MLflow and return its embedder; the weights are loaded once per process."""
    place = model if isinstance(model, str) else str(model.folder)
    python_model: Any = mlflow.pyfunc.load_model(place).unwrap_python_model()
    return python_model.embedder


def sample_path(model: ResolvedModel) -> Path | None:
    """Return the file of rows and answers that were stored with a version; None where an earlier package made it."""
    flavor = mlflow.models.Model.load(str(model.folder)).flavors["python_function"]
    entry = flavor["artifacts"].get("sample")
    return model.folder / entry["path"] if entry else None


def code_difference(model: ResolvedModel) -> str | None:
    """Say how the installed code differs from the code that registered a version; None where it gives its numbers.

    With the same source and the same libraries it does. Otherwise it answers the version's stored sample on the CPU,
    within `SAMPLE_TOLERANCE` of what was stored.
    """
    if _same_source(model) and _same_libraries(model):
        return None
    path = sample_path(model)
    if path is None:
        return "the version carries no stored answers to compare with"
    sample = json.loads(path.read_text(encoding="utf-8"))
    embedder = load_embedder(model.checkpoint, digest=model.digest, device="cpu")
    for case in sample["cases"]:
        what = f"mode {case['params']['mode']!r}"
        try:
            parameters = Parameters.create(case["params"])
        except ConfigError as exc:
            return f"{what}: {exc}"
        for row, stored in zip(sample["rows"], case["answers"], strict=True):
            answer = pyfunc.answer_columns(embedder.embed(row, parameters), parameters, embedder.config.embsize)
            difference = answer_difference(stored, answer)
            if difference is None:
                return f"{what}: other genes, cells or error than when it was registered"
            if difference > SAMPLE_TOLERANCE:
                return f"{what}: numbers differ by up to {difference:.2g} from those stored when it was registered"
    return None


def answer_difference(stored: dict[str, Any], answer: dict[str, Any]) -> float | None:
    """Return the largest difference of two answers' numbers; None where they are not of the same genes and cells."""
    same = all(stored[name] == answer[name] for name in ("genes", "cell_ids", "n_cells", "error"))
    was, now = (unpacked(a["embeddings_base64"] or "", "float32_base64", a["embedding_dim"]) for a in (stored, answer))
    if not same or was.shape != now.shape or not np.isfinite(now).all():
        return None
    return float(np.abs(was - now).max(initial=0.0))


def registered_by(model: ResolvedModel) -> str:
    """Return the package version that registered a model."""
    metadata = mlflow.models.Model.load(str(model.folder)).metadata or {}
    return str(metadata.get("package_version", "of unknown version"))


def _same_source(model: ResolvedModel) -> bool:
    return _source(model.folder / "code" / scgpt_batch.__name__) == _source(files(scgpt_batch))


def _source(folder: Traversable) -> dict[str, bytes]:
    """Read the Python files below a folder, which may lie in a zip file."""
    found: dict[str, bytes] = {}
    if not folder.is_dir():
        return found
    for entry in folder.iterdir():
        if entry.is_dir():
            found |= {f"{entry.name}/{name}": text for name, text in _source(entry).items()}
        elif entry.name.endswith(".py"):
            found[entry.name] = entry.read_bytes()
    return found


def _same_libraries(model: ResolvedModel) -> bool:
    """Compare the installed libraries with those that the version was registered with."""
    try:
        lines = (model.folder / "requirements.txt").read_text(encoding="utf-8").split()
        pinned = [line.split("==") for line in lines if "==" in line]
        return all(_public_version(name) == version for name, version in pinned)
    except (OSError, PackageNotFoundError, ValueError):
        return False


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


def _stored_answers(checkpoint: Checkpoint) -> dict[str, Any]:
    """Make a row of three cells with up to 32 genes, and what this model answers to it here and now."""
    genes = [token for token in checkpoint.vocabulary.tokens if token not in SPECIAL_TOKENS][:32]
    counts = np.random.default_rng(0).poisson(2.0, (3, len(genes))).astype(np.float64) + 1.0
    row = dict.fromkeys(PAYLOAD_COLUMNS) | {
        "adata_sparsematrix": counts.tolist(),
        "adata_obs": table_to_json(pd.DataFrame(index=["cell1", "cell2", "cell3"])),
        "adata_var": table_to_json(pd.DataFrame(index=genes)),
    }
    embedder, cases = Embedder(checkpoint, device="cpu"), []  # a GPU's numbers differ by more than CPUs' among them
    for params in SAMPLE_CASES:
        parameters = Parameters.create(params)
        answer = pyfunc.answer_columns(embedder.embed(row, parameters), parameters, checkpoint.config.embsize)
        cases.append({"params": params, "answers": [answer]})
    return {"rows": [row], "cases": cases}


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


def _public_version(package: str) -> str:
    """Return an installed version that a package index has; mlflow's also where only mlflow-skinny is installed."""
    try:
        return installed_version(package).split("+")[0]
    except PackageNotFoundError:
        if package != "mlflow":
            raise
        return installed_version("mlflow-skinny")


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

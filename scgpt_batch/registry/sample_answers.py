"""Sample rows and their results, stored with each version, to check that other code reproduces them."""

import json
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pandas as pd

import scgpt_batch
from scgpt_batch.errors import ConfigError
from scgpt_batch.inference.results import unpack
from scgpt_batch.io.rows import PAYLOAD_COLUMNS, table_to_json
from scgpt_batch.models.scgpt.vocabulary import SPECIAL_TOKENS
from scgpt_batch.parameters import Parameters
from scgpt_batch.registry.resolve import ResolvedModel
from scgpt_batch.registry.signature import answer_columns

if TYPE_CHECKING:
    from scgpt_batch.models.scgpt.checkpoint import Checkpoint

SAMPLE = "sample.json"
SAMPLE_TOLERANCE = 1e-5  # largest difference between the float32 embeddings of two CPUs

# Parameters for which the results of the sample are stored: every mode, with and without preprocessing.
_BINS_ONLY = {"need_preprocess": False, "encoding": "float32_base64"}
_PREPROCESSED = {"data_is_raw": True, "log1p": True, "subset_hvg": 0, "encoding": "float32_base64"}
SAMPLE_CASES: tuple[dict[str, Any], ...] = (
    *({"mode": mode, **_BINS_ONLY} for mode in ("static", "contextual", "cell")),
    {"mode": "cell", **_PREPROCESSED},
)


def sample_path(model: ResolvedModel) -> Path | None:
    """Return the file with the sample of a version; None if an early version of the package registered it."""
    flavor = mlflow.models.Model.load(str(model.folder)).flavors["python_function"]
    entry = flavor["artifacts"].get("sample")
    return model.folder / entry["path"] if entry else None


def code_difference(model: ResolvedModel) -> str | None:
    """Return how results of the installed code differ from those of the code that registered a version, or None.

    If the source and the libraries are the same, so are the results. Otherwise the stored sample is computed on the
    CPU, and must match within `SAMPLE_TOLERANCE`.
    """
    if _same_source(model) and _same_libraries(model):
        return None
    path = sample_path(model)
    if path is None:
        return "the version has no stored results to compare with"
    from scgpt_batch.inference.engine import load_embedder  # imports torch, for seconds

    sample = json.loads(path.read_text(encoding="utf-8"))
    embedder = load_embedder(model.checkpoint, digest=model.digest, device="cpu")
    for case in sample["cases"]:
        mode = f"mode {case['params']['mode']!r}"
        try:
            parameters = Parameters.create(case["params"])
        except ConfigError as exc:
            return f"{mode}: {exc}"
        for row, stored in zip(sample["rows"], case["answers"], strict=True):
            answer = answer_columns(embedder.embed(row, parameters), parameters, embedder.config.embsize)
            difference = answer_difference(stored, answer)
            if difference is None:
                return f"{mode}: other genes, cells or error than at registration"
            if difference > SAMPLE_TOLERANCE:
                return f"{mode}: embeddings differ by up to {difference:.2g} from those at registration"
    return None


def answer_difference(stored: dict[str, Any], answer: dict[str, Any]) -> float | None:
    """Return the largest difference between the embeddings of two results.

    None if genes, cells or errors differ, or if the new embeddings are not finite.
    """
    same = all(stored[name] == answer[name] for name in ("genes", "cell_ids", "n_cells", "error"))
    old, new = (unpack(a["embeddings_base64"] or "", "float32_base64", a["embedding_dim"]) for a in (stored, answer))
    if not same or old.shape != new.shape or not np.isfinite(new).all():
        return None
    return float(np.abs(old - new).max(initial=0.0))


def registered_by(model: ResolvedModel) -> str:
    """Return the version of this package that registered a model."""
    metadata = mlflow.models.Model.load(str(model.folder)).metadata or {}
    return str(metadata.get("package_version", "of unknown version"))


def _same_source(model: ResolvedModel) -> bool:
    return _source(model.folder / "code" / scgpt_batch.__name__) == _source(files(scgpt_batch))


def _source(folder: Traversable) -> dict[str, bytes]:
    """Return the content of the Python files below a folder, which may be inside a zip file."""
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
    """Return whether the installed libraries are those that the version was registered with."""
    try:
        lines = (model.folder / "requirements.txt").read_text(encoding="utf-8").split()
        pinned = [line.split("==") for line in lines if "==" in line]
        return all(public_version(name) == version for name, version in pinned)
    except (OSError, PackageNotFoundError, ValueError):
        return False


def stored_answers(checkpoint: "Checkpoint") -> dict[str, Any]:
    """Return a row of three cells with up to 32 genes, and its results for each of `SAMPLE_CASES`."""
    from scgpt_batch.inference.engine import Embedder

    genes = [token for token in checkpoint.vocabulary.tokens if token not in SPECIAL_TOKENS][:32]
    counts = np.random.default_rng(0).poisson(2.0, (3, len(genes))).astype(np.float64) + 1.0
    row = dict.fromkeys(PAYLOAD_COLUMNS) | {
        "adata_sparsematrix": counts.tolist(),
        "adata_obs": table_to_json(pd.DataFrame(index=["cell1", "cell2", "cell3"])),
        "adata_var": table_to_json(pd.DataFrame(index=genes)),
    }
    embedder, cases = Embedder(checkpoint, device="cpu"), []  # GPU and CPU differ by more than SAMPLE_TOLERANCE
    for params in SAMPLE_CASES:
        parameters = Parameters.create(params)
        answer = answer_columns(embedder.embed(row, parameters), parameters, checkpoint.config.embsize)
        cases.append({"params": params, "answers": [answer]})
    return {"rows": [row], "cases": cases}


def public_version(package: str) -> str:
    """Return the installed version of a package without a local suffix; for mlflow, mlflow-skinny also counts."""
    try:
        return installed_version(package).split("+")[0]
    except PackageNotFoundError:
        if package != "mlflow":
            raise
        return installed_version("mlflow-skinny")

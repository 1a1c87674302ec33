"""Sample rows stored with each version, and the check that the installed code still gives their embeddings."""

import json
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd

import scgpt_batch
from scgpt_batch.errors import ConfigError
from scgpt_batch.inference.engine import Embedder, load_embedder
from scgpt_batch.inference.results import unpack
from scgpt_batch.io.rows import PAYLOAD_COLUMNS, table_to_json
from scgpt_batch.models.scgpt import (
    SPECIAL_TOKENS,
    Checkpoint,
)
from scgpt_batch.parameters import Parameters
from scgpt_batch.registry.resolve import ResolvedModel
from scgpt_batch.registry.signature import answer_columns

SAMPLE = "sample.json"
SAMPLE_TOLERANCE = 1e-5  # of a number in its answers, in float32 on any CPU

# What the sample is asked when a version is registered, and again when it is promoted: every mode, and preprocessing.
_BINS_ONLY = {"need_preprocess": False, "encoding": "float32_base64"}
_PREPROCESSED = {"data_is_raw": True, "log1p": True, "subset_hvg": 0, "encoding": "float32_base64"}
SAMPLE_CASES: tuple[dict[str, Any], ...] = (
    *({"mode": mode, **_BINS_ONLY} for mode in ("static", "contextual", "cell")),
    {"mode": "cell", **_PREPROCESSED},
)


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
            answer = answer_columns(embedder.embed(row, parameters), parameters, embedder.config.embsize)
            difference = answer_difference(stored, answer)
            if difference is None:
                return f"{what}: other genes, cells or error than when it was registered"
            if difference > SAMPLE_TOLERANCE:
                return f"{what}: numbers differ by up to {difference:.2g} from those stored when it was registered"
    return None


def answer_difference(stored: dict[str, Any], answer: dict[str, Any]) -> float | None:
    """Return the largest difference of two answers' numbers; None where they are not of the same genes and cells."""
    same = all(stored[name] == answer[name] for name in ("genes", "cell_ids", "n_cells", "error"))
    was, now = (unpack(a["embeddings_base64"] or "", "float32_base64", a["embedding_dim"]) for a in (stored, answer))
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
        answer = answer_columns(embedder.embed(row, parameters), parameters, checkpoint.config.embsize)
        cases.append({"params": params, "answers": [answer]})
    return {"rows": [row], "cases": cases}


def _public_version(package: str) -> str:
    """Return an installed version that a package index has; mlflow's also where only mlflow-skinny is installed."""
    try:
        return installed_version(package).split("+")[0]
    except PackageNotFoundError:
        if package != "mlflow":
            raise
        return installed_version("mlflow-skinny")

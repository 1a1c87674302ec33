"""The command `scgpt-batch promote`: the challenger becomes champion when it answers right, fast and alike.

Works on any MLflow registry. Both versions answer in processes of their own, with the code that each carries.
"""

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException

from scgpt_batch.command_result import FAILED, OK, CommandResult
from scgpt_batch.errors import ConfigError, ScgptBatchError
from scgpt_batch.inference.results import unpack
from scgpt_batch.io.rows import PAYLOAD_COLUMNS
from scgpt_batch.models.scgpt import SPECIAL_TOKENS
from scgpt_batch.registry.resolve import ResolvedModel, load, resolve
from scgpt_batch.registry.sample_answers import answer_difference, sample_path
from scgpt_batch.settings import PromoteSettings

logger = logging.getLogger(__name__)

REPEATS = 3  # of each row when it is timed; the fastest counts, because others use the machine too
PROCESS_SECONDS = 3600
# a cell's vector by these depends on the cell, the model and its code alone; of a bad row the error is the answer
CELLS: dict[str, Any] = {"mode": "cell", "need_preprocess": False, "encoding": "float32_base64", "on_error": "record"}


@dataclass(frozen=True)
class Check:
    """One question to the challenger, and its answer."""

    check: str
    passed: bool
    message: str
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class PromoteResult(CommandResult):
    """What the checks found, and whether the alias was moved."""

    model: str
    version: str  # the challenger
    previous: str | None  # the champion before
    checks: list[Check]
    refused: list[str]  # checks that did not pass
    promoted: bool

    def lines(self) -> list[str]:
        """List the checks, then the decision."""
        checks = [f"{'passed' if each.passed else 'FAILED'}  {each.check}: {each.message}" for each in self.checks]
        if self.promoted:
            decision = "is promoted"
        elif self.refused:
            decision = f"is not promoted; failed checks: {', '.join(self.refused)}"
        elif self.version == self.previous:
            decision = "is the champion already"
        else:
            decision = "passes all checks; plan only, nothing is changed"
        return [*checks, f"version {self.version} of {self.model} {decision}"]


def promote(settings: PromoteSettings) -> PromoteResult:
    """Check the challenger, against the champion where there is one, and move the alias when all is well.

    Raises
    ------
    ConfigError
        There is no such model, challenger or sample of rows.
    ScgptBatchError
        The champion itself does not answer, so there is nothing to compare with.
    """
    aliases = _aliases(settings.name)
    challenger, now = _version(settings, aliases), aliases.get(settings.champion)
    versions: dict[str, Any] = {"model": settings.name, "version": challenger, "previous": now}
    if challenger == now:
        logger.info("version %s is %s already", challenger, settings.champion)
        return PromoteResult(**versions, checks=[], refused=[], promoted=False)
    new = resolve(f"models:/{settings.name}/{challenger}")
    old = resolve(f"models:/{settings.name}/{now}") if now else None
    checks = check(settings, new, old)
    refused = [each.check for each in checks if not each.passed]
    for each in checks:
        logger.log(logging.INFO if each.passed else logging.WARNING, "%s: %s", each.check, each.message)
    if refused:
        logger.warning("version %s is not promoted: %s", challenger, ", ".join(refused))
    elif not settings.plan:
        try:
            mlflow.MlflowClient().set_registered_model_alias(settings.name, settings.champion, challenger)
        except MlflowException as exc:
            raise ConfigError(f"MLflow does not set alias {settings.champion!r}: {exc.message}") from exc
        logger.info("version %s of %s is %s", challenger, settings.name, settings.champion)
    return PromoteResult(
        **versions,
        exit_code=FAILED if refused else OK,
        checks=checks,
        refused=refused,
        promoted=not refused and not settings.plan,
    )


def check(settings: PromoteSettings, new: ResolvedModel, old: ResolvedModel | None) -> list[Check]:
    """Ask both versions and compare: parity, latency, drift of gene and of cell vectors."""
    sample = _stored_sample(new)
    rows = _rows(settings) if settings.rows else (sample or {}).get("rows", [])
    cells = {"rows": rows, "params": CELLS, "repeats": REPEATS}
    cases = [{"rows": sample["rows"], "params": c["params"], "repeats": 1} for c in sample["cases"]] if sample else []
    try:
        *stored, found = _answers(new, [*cases, cells])
    except _DoesNotAnswer as exc:
        return [Check("parity", False, f"version {new.version} does not answer: {exc}")]
    parity = _parity(settings, new, sample, [told["answers"] for told in stored])
    if old is None:
        return [parity, _rows_answered(new, found, None)]
    try:
        (champions,) = _answers(old, [cells])
    except _DoesNotAnswer as exc:
        raise ScgptBatchError(f"the {settings.champion}, version {old.version}, does not answer: {exc}") from exc
    return [
        parity,
        _rows_answered(new, found, champions),
        _latency(settings, found["seconds"], champions["seconds"]),
        _gene_drift(settings, new, old),
        _cell_drift(settings, found["answers"], champions["answers"]),
    ]


# The checks


def _parity(settings: PromoteSettings, new: ResolvedModel, sample: Any, found: list[list[dict[str, Any]]]) -> Check:
    """Compare with what the version answered when it was registered."""
    if sample is None:
        return Check("parity", False, f"version {new.version} carries no stored answers: register it again")
    largest = 0.0
    for case, answers in zip(sample["cases"], found, strict=True):
        for stored, answer in zip(case["answers"], answers, strict=True):
            difference = answer_difference(stored, answer)
            if difference is None:
                where = f"mode {case['params']['mode']!r}"
                return Check("parity", False, f"{where}: other genes, cells or error than when it was registered")
            largest = max(largest, difference)
    message = f"largest difference to the answers stored when it was registered: {largest:.2g}"
    return Check("parity", largest <= settings.tolerance, message, largest, settings.tolerance)


def _rows_answered(new: ResolvedModel, found: dict[str, Any], champions: dict[str, Any] | None) -> Check:
    """Refuse a version that fails rows which the champion answers; without champion, any."""
    answered = [True] * len(found["answers"])
    if champions:
        answered = [told["error"] is None for told in champions["answers"]]
    errors = [t["error"] for t, was in zip(found["answers"], answered, strict=True) if was and t["error"]]
    message = f"{len(found['answers']) - len(errors)} of {len(found['answers'])} rows answered as well as before"
    if errors:
        message = f"version {new.version} fails {len(errors)} rows, first: {errors[0]}"
    return Check("rows", not errors, message, float(len(errors)), 0.0)


def _latency(settings: PromoteSettings, seconds: float, champions: float) -> Check:
    ratio = seconds / champions
    message = f"{seconds:.3f} s for the rows, {ratio:.2f} times the champion's {champions:.3f} s"
    return Check("latency", ratio <= settings.max_slowdown, message, ratio, settings.max_slowdown)


def _gene_drift(settings: PromoteSettings, new: ResolvedModel, old: ResolvedModel) -> Check:
    """Compare the static vectors of all genes that both know."""
    ours, theirs = load(new), load(old)
    if ours.config.embsize != theirs.config.embsize:
        told = f"vectors of {ours.config.embsize} numbers instead of {theirs.config.embsize}"
        return Check("gene_drift", False, f"{told}: nothing that holds the champion's can take them")
    known = [gene for gene in theirs.vocabulary.tokens if gene not in SPECIAL_TOKENS]
    genes = [gene for gene in known if gene in ours.vocabulary]
    if not genes:
        return Check("gene_drift", False, "no gene of the champion's vocabulary is in the challenger's")
    cosine = _cosines(ours.gene_table[ours.vocabulary.ids(genes)], theirs.gene_table[theirs.vocabulary.ids(genes)])
    moved = ", ".join(f"{genes[i]} {cosine[i]:.2f}" for i in np.argsort(cosine)[:5])
    mean = float(cosine.mean())
    message = f"mean cosine of {len(genes)} genes {mean:.4f}, {len(known) - len(genes)} genes lost; moved most: {moved}"
    return Check("gene_drift", mean >= settings.min_cosine, message, mean, settings.min_cosine)


def _cell_drift(settings: PromoteSettings, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Check:
    """Compare the vectors of the sample's cells: they tell of the transformer, which gene vectors do not."""
    pairs = [(_vectors(a), _vectors(b)) for a, b in zip(ours, theirs, strict=True) if not (a["error"] or b["error"])]
    if not pairs:
        return Check("cell_drift", False, "no row of the sample is answered by both: give other --rows")
    if any(a.shape != b.shape or not np.isfinite(a).all() for a, b in pairs):
        return Check("cell_drift", False, "vectors of another number or length, or not finite")
    cosine = np.concatenate([_cosines(a, b) for a, b in pairs])
    mean = float(cosine.mean())
    message = f"mean cosine of {len(cosine)} cells {mean:.4f}, least {cosine.min():.4f}"
    return Check("cell_drift", mean >= settings.min_cosine, message, mean, settings.min_cosine)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows; 0 where one is zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)  # squares of whatever a broken version answers fit
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(lengths, np.finfo(np.float64).tiny)


def _vectors(answer: dict[str, Any]) -> np.ndarray:
    return unpack(answer["embeddings_base64"] or "", CELLS["encoding"], answer["embedding_dim"])


# What is asked, and of whom


class _DoesNotAnswer(Exception):
    """A version's process ended without answers."""


def _answers(model: ResolvedModel, questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Let a version answer in a process of its own."""
    logger.info("asking version %s", model.version)
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder) / "questions.json", Path(folder) / "answers.json"
        asked.write_text(json.dumps(questions), encoding="utf-8")
        # -P: without it this package's folder, with modules named `model` and `samples`, would be on the path
        command = [sys.executable, "-P", str(Path(__file__).with_name("run_version.py"))]
        try:
            done = subprocess.run([*command, str(model.folder.absolute()), asked, told], cwd=folder, check=False,
                                  capture_output=True, text=True, timeout=PROCESS_SECONDS)  # fmt: skip
        except subprocess.TimeoutExpired as exc:
            raise _DoesNotAnswer(f"no answer within {PROCESS_SECONDS} s") from exc
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            raise _DoesNotAnswer(lines[-1] if lines else f"its process ended with {done.returncode}")
        return json.loads(told.read_text(encoding="utf-8"))


def _stored_sample(model: ResolvedModel) -> dict[str, Any] | None:
    """Read the rows and answers that `register` stored with the version; None in those of earlier packages."""
    path = sample_path(model)
    return json.loads(path.read_text(encoding="utf-8")) if path else None


def _rows(settings: PromoteSettings) -> list[dict[str, Any]]:
    """Read the sample: a .parquet or .json file, or an adata_rows table by Spark."""
    found = _from_file(Path(settings.rows)) if settings.rows.endswith((".parquet", ".json")) else _from_table(settings)
    rows = [{name: _plain(name, row.get(name)) for name in PAYLOAD_COLUMNS} for row in found[: settings.max_rows]]
    if not rows:
        raise ConfigError(f"{settings.rows} holds no rows")
    return rows


def _from_file(path: Path) -> list[dict[str, Any]]:
    try:
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_json(path, dtype=False)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot read rows from {path}: {exc}") from exc
    if not set(PAYLOAD_COLUMNS) & set(frame.columns):
        raise ConfigError(f"{path} holds no rows of adata_rows: it has none of {', '.join(PAYLOAD_COLUMNS)}")
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def _from_table(settings: PromoteSettings) -> list[dict[str, Any]]:
    from scgpt_batch.spark import tables
    from scgpt_batch.spark.session import get_spark

    table = tables.table_name(settings.rows)
    rows = tables.read(get_spark(settings.spark_conf), table, tables.ADATA_ROWS).select("adata_id", *PAYLOAD_COLUMNS)
    return rows.orderBy("adata_id").limit(settings.max_rows).toArrow().to_pylist()


def _plain(name: str, value: Any) -> Any:
    """Turn arrays into the lists that MLflow's schema takes: numbers of the matrix with a point, positions without."""
    if value is None or isinstance(value, str):
        return value
    if name == "adata_sparsematrix":
        return [np.asarray(cell, np.float64).tolist() for cell in value]
    return np.asarray(value, np.float64 if name == "x_data" else np.int64).tolist()


def _aliases(name: str) -> dict[str, str]:
    try:
        found = mlflow.MlflowClient().get_registered_model(name)
    except MlflowException as exc:
        raise ConfigError(f"no model {name!r} in {mlflow.get_registry_uri()}: {exc.message}") from exc
    return {alias: str(version) for alias, version in found.aliases.items()}


def _version(settings: PromoteSettings, aliases: dict[str, str]) -> str:
    if settings.challenger.isdigit():
        return settings.challenger
    if settings.challenger not in aliases:
        raise ConfigError(
            f"model {settings.name!r} has no alias {settings.challenger!r}: register the new version with "
            f"--alias {settings.challenger}, or give its number as --challenger"
        )
    return aliases[settings.challenger]

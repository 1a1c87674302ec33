"""The command `scgpt-batch promote`, which moves the champion alias to a challenger that passes all checks.

It works with any MLflow registry. Each version runs in its own process, with the code stored with it.
"""

import json
import logging
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
from scgpt_batch.io.locations import local_path
from scgpt_batch.io.rows import PAYLOAD_COLUMNS
from scgpt_batch.models.scgpt.vocabulary import SPECIAL_TOKENS
from scgpt_batch.promotion.version_process import RunVersion, VersionFailed, run_in_own_process
from scgpt_batch.registry.resolve import ResolvedModel, load, resolve
from scgpt_batch.registry.sample_answers import answer_difference, sample_path
from scgpt_batch.settings import PromoteSettings

logger = logging.getLogger(__name__)

REPEATS = 3  # runs of each row when it is timed; the fastest counts, because other processes use the machine too
# With these parameters a cell's vector depends only on the cell, the model and its code; failed rows return an error.
CELLS: dict[str, Any] = {"mode": "cell", "need_preprocess": False, "encoding": "float32_base64", "on_error": "record"}


@dataclass(frozen=True)
class Check:
    """The result of one check of the challenger."""

    check: str
    passed: bool
    message: str
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class PromoteResult(CommandResult):
    """The results of the checks, and whether the alias was moved."""

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


def promote(settings: PromoteSettings, run: RunVersion = run_in_own_process) -> PromoteResult:
    """Check the challenger, compare it with the champion if there is one, and move the alias if all checks pass.

    Parameters
    ----------
    settings
        The model, the aliases, the rows and the thresholds.
    run
        How a version computes its results.

    Raises
    ------
    ConfigError
        The model, the challenger or the rows do not exist.
    ScgptBatchError
        The champion fails, so there is nothing to compare with.
    """
    aliases = _aliases(settings.name)
    challenger, now = _version(settings, aliases), aliases.get(settings.champion)
    versions: dict[str, Any] = {"model": settings.name, "version": challenger, "previous": now}
    if challenger == now:
        logger.info("version %s is %s already", challenger, settings.champion)
        return PromoteResult(**versions, checks=[], refused=[], promoted=False)
    new = resolve(f"models:/{settings.name}/{challenger}")
    old = resolve(f"models:/{settings.name}/{now}") if now else None
    checks = check(settings, new, old, run)
    refused = [each.check for each in checks if not each.passed]
    for each in checks:
        logger.log(logging.INFO if each.passed else logging.WARNING, "%s: %s", each.check, each.message)
    if refused:
        logger.warning("version %s is not promoted: %s", challenger, ", ".join(refused))
    elif not settings.plan:
        try:
            mlflow.MlflowClient().set_registered_model_alias(settings.name, settings.champion, challenger)
        except MlflowException as exc:
            raise ConfigError(
                f"MLflow did not set the alias {settings.champion!r} of {settings.name!r}: {exc.message}"
            ) from exc
        logger.info("version %s of %s is %s", challenger, settings.name, settings.champion)
    return PromoteResult(
        **versions,
        exit_code=FAILED if refused else OK,
        checks=checks,
        refused=refused,
        promoted=not refused and not settings.plan,
    )


def check(settings: PromoteSettings, new: ResolvedModel, old: ResolvedModel | None, run: RunVersion) -> list[Check]:
    """Return the checks of a version against its stored results and the champion.

    Parameters
    ----------
    settings
        Thresholds, and the rows to compare on.
    new
        The challenger.
    old
        The champion, or None.
    run
        How a version computes its results.
    """
    sample = _stored_sample(new)
    rows = _rows(settings) if settings.rows else (sample or {}).get("rows", [])
    cells = {"rows": rows, "params": CELLS, "repeats": REPEATS}
    cases = [{"rows": sample["rows"], "params": c["params"], "repeats": 1} for c in sample["cases"]] if sample else []
    try:
        *stored, found = run(new, [*cases, cells])
    except VersionFailed as exc:
        return [Check("parity", False, f"version {new.version} failed: {exc}")]
    parity = _parity(settings, new, sample, [result["answers"] for result in stored])
    if old is None:
        return [parity, _rows_answered(new, found, None)]
    try:
        (champions,) = run(old, [cells])
    except VersionFailed as exc:
        raise ScgptBatchError(f"the {settings.champion}, version {old.version}, failed: {exc}") from exc
    return [
        parity,
        _rows_answered(new, found, champions),
        _latency(settings, found["seconds"], champions["seconds"]),
        _gene_drift(settings, new, old),
        _cell_drift(settings, found["answers"], champions["answers"]),
    ]


# The checks


def _parity(settings: PromoteSettings, new: ResolvedModel, sample: Any, found: list[list[dict[str, Any]]]) -> Check:
    """Compare the results with those stored when the version was registered."""
    if sample is None:
        return Check("parity", False, f"version {new.version} has no stored results: register it again")
    largest = 0.0
    for case, answers in zip(sample["cases"], found, strict=True):
        for stored, answer in zip(case["answers"], answers, strict=True):
            difference = answer_difference(stored, answer)
            if difference is None:
                where = f"mode {case['params']['mode']!r}"
                return Check("parity", False, f"{where}: other genes, cells or error than at registration")
            largest = max(largest, difference)
    message = f"largest difference from the results stored at registration: {largest:.2g}"
    return Check("parity", largest <= settings.tolerance, message, largest, settings.tolerance)


def _rows_answered(new: ResolvedModel, found: dict[str, Any], champions: dict[str, Any] | None) -> Check:
    """Check that all rows succeed that succeed with the champion; without champion, all rows."""
    expected = [True] * len(found["answers"])
    if champions:
        expected = [result["error"] is None for result in champions["answers"]]
    results = zip(found["answers"], expected, strict=True)
    errors = [result["error"] for result, must_succeed in results if must_succeed and result["error"]]
    message = f"{len(found['answers']) - len(errors)} of {len(found['answers'])} rows succeed as before"
    if errors:
        message = f"{len(errors)} rows fail with version {new.version}, first: {errors[0]}"
    return Check("rows", not errors, message, float(len(errors)), 0.0)


def _latency(settings: PromoteSettings, seconds: float, champions: float) -> Check:
    ratio = seconds / champions
    message = f"{seconds:.3f} s for the rows, {ratio:.2f} times the champion's {champions:.3f} s"
    return Check("latency", ratio <= settings.max_slowdown, message, ratio, settings.max_slowdown)


def _gene_drift(settings: PromoteSettings, new: ResolvedModel, old: ResolvedModel) -> Check:
    """Compare the static embeddings of the genes in both vocabularies."""
    ours, theirs = load(new), load(old)
    if ours.config.embsize != theirs.config.embsize:
        message = f"vectors have {ours.config.embsize} dimensions instead of the champion's {theirs.config.embsize}"
        return Check("gene_drift", False, f"{message}; register it under another name")
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
    """Compare the cell embeddings of the rows; unlike gene embeddings, they depend on the transformer."""
    pairs = [(_vectors(a), _vectors(b)) for a, b in zip(ours, theirs, strict=True) if not (a["error"] or b["error"])]
    if not pairs:
        return Check("cell_drift", False, "no row succeeds with both versions: use other --rows")
    if any(a.shape != b.shape or not np.isfinite(a).all() for a, b in pairs):
        return Check("cell_drift", False, "the number or size of the vectors differs, or they are not finite")
    cosine = np.concatenate([_cosines(a, b) for a, b in pairs])
    mean = float(cosine.mean())
    message = f"mean cosine of {len(cosine)} cells {mean:.4f}, minimum {cosine.min():.4f}"
    return Check("cell_drift", mean >= settings.min_cosine, message, mean, settings.min_cosine)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows; 0 if one of them is zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)  # a broken version may return values whose squares overflow
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(lengths, np.finfo(np.float64).tiny)


def _vectors(answer: dict[str, Any]) -> np.ndarray:
    return unpack(answer["embeddings_base64"] or "", CELLS["encoding"], answer["embedding_dim"])


# Input rows


def _stored_sample(model: ResolvedModel) -> dict[str, Any] | None:
    """Return the rows and results that `register` stored with a version; None if an early version registered it."""
    path = sample_path(model)
    return json.loads(path.read_text(encoding="utf-8")) if path else None


def _rows(settings: PromoteSettings) -> list[dict[str, Any]]:
    """Return the rows of `settings.rows`: a .parquet or .json file, or an adata_rows table, read with Spark."""
    is_file = settings.rows.endswith((".parquet", ".json"))
    found = _from_file(local_path(settings.rows, "rows")) if is_file else _from_table(settings)
    rows = [{name: _plain(name, row.get(name)) for name in PAYLOAD_COLUMNS} for row in found[: settings.max_rows]]
    if not rows:
        raise ConfigError(f"{settings.rows} has no rows; use another --rows")
    return rows


def _from_file(path: Path) -> list[dict[str, Any]]:
    try:
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_json(path, dtype=False)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot read rows from {path}: {exc}") from exc
    if not set(PAYLOAD_COLUMNS) & set(frame.columns):
        raise ConfigError(f"{path} has none of the columns of adata_rows: {', '.join(PAYLOAD_COLUMNS)}")
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def _from_table(settings: PromoteSettings) -> list[dict[str, Any]]:
    from scgpt_batch.spark import tables
    from scgpt_batch.spark.session import get_spark

    table = tables.table_name(settings.rows)
    rows = tables.read(get_spark(settings.spark_conf), table, tables.ADATA_ROWS).select("adata_id", *PAYLOAD_COLUMNS)
    return rows.orderBy("adata_id").limit(settings.max_rows).toArrow().to_pylist()


def _plain(name: str, value: Any) -> Any:
    """Return arrays as lists of the types in MLflow's schema: floats for values, integers for positions."""
    if value is None or isinstance(value, str):
        return value
    if name == "adata_sparsematrix":
        return [np.asarray(cell, np.float64).tolist() for cell in value]
    return np.asarray(value, np.float64 if name == "x_data" else np.int64).tolist()


def _aliases(name: str) -> dict[str, str]:
    try:
        found = mlflow.MlflowClient().get_registered_model(name)
    except MlflowException as exc:
        raise ConfigError(f"there is no model {name!r} in {mlflow.get_registry_uri()}: {exc.message}") from exc
    return {alias: str(version) for alias, version in found.aliases.items()}


def _version(settings: PromoteSettings, aliases: dict[str, str]) -> str:
    if settings.challenger.isdigit():
        return settings.challenger
    if settings.challenger not in aliases:
        raise ConfigError(
            f"model {settings.name!r} has no alias {settings.challenger!r}: register the new version with "
            f"--alias {settings.challenger}, or set --challenger to its version number"
        )
    return aliases[settings.challenger]

"""`evaluate`: figures of cell embeddings beside HVG + PCA of these cells, of gene embeddings beside permuted names."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from scgpt_batch.analysis.evaluate import FOLDS, cell_metrics, compare, drift, gene_family_recall
from scgpt_batch.cli.analysis_tables import EVALUATIONS, AnalysisTables
from scgpt_batch.cli.cell_sources import are_counts, log_left_out, read_cells
from scgpt_batch.cli.gene_vectors import gene_vectors
from scgpt_batch.command_result import CommandResult, plural
from scgpt_batch.embedding_tables import MODEL, Embeddings
from scgpt_batch.errors import ConfigError
from scgpt_batch.settings import EvaluateSettings

logger = logging.getLogger(__name__)

NO_BASELINE = "These cells have no counts here, so there is no HVG + PCA to compare with."


@dataclass(frozen=True, kw_only=True)
class EvaluateResult(CommandResult):
    """The figures of the embeddings, and of the baseline."""

    metrics: dict[str, dict[str, float | None]]  # metric -> value and baseline
    verdict: str
    cells: int
    genes: int
    baseline: str
    table: str | None

    def lines(self) -> list[str]:
        """Show the figures as a table, and the verdict."""
        lines = [f"{'':<24} {'embedding':>12} {self.baseline:>16}"]
        for name, values in self.metrics.items():
            lines.append(f"{name:<24} {_shown(values['value']):>12} {_shown(values['baseline']):>16}")
        return [*lines, self.verdict, *([f"figures in {self.table}"] if self.table else [])]


def evaluate(settings: EvaluateSettings) -> EvaluateResult:
    """Measure the embeddings of a table.

    Raises
    ------
    ConfigError
        A table, file or column does not exist, there are too few labels, or a version has no vectors.
    """
    tables = AnalysisTables(settings.spark_conf)
    if "gene" in tables.columns(settings.embeddings):
        result, model = _genes(settings, tables)
    else:
        result, model = _cells(settings, tables)
    if settings.out:
        params = settings.model_dump(include={"neighbours", "max_cells", "batch_column", "compare_version"})
        constants = tables.made_of(settings.embeddings, model, params) | {
            "labels": settings.obs or None, "label_column": settings.label_column,
        }  # fmt: skip
        rows = pa.table({
            "metric": list(result.metrics),
            "value": pa.array([values["value"] for values in result.metrics.values()], pa.float64()),
            "baseline": pa.array([values["baseline"] for values in result.metrics.values()], pa.float64()),
        })  # fmt: skip
        tables.replace(settings.out, EVALUATIONS, rows, constants, (*MODEL, "source_table", "label_column"))
    return result


def _cells(settings: EvaluateSettings, tables: AnalysisTables) -> tuple[EvaluateResult, dict[str, str]]:
    if not settings.obs:
        raise ConfigError("cell embeddings are measured by the labels of their cells: give --obs and --label-column")
    cells = read_cells(settings.obs, tables)
    found = tables.embeddings(settings.embeddings, mode="cell", model_version=settings.model_version)
    places = cells.places(found.frame()[["adata_id", "cell_id"]], settings.embeddings)
    labels = cells.labels(settings.label_column, places)
    batches = cells.labels(settings.batch_column, places) if settings.batch_column else None
    kept = _kept(labels, batches, found.vectors, settings)
    vectors, places, labels = found.vectors[kept], places[kept], labels[kept]
    of_batch = None if batches is None else batches[kept]
    adata = cells.counts(places) if cells.have_counts else None
    if adata is not None and are_counts(adata):
        adata.obs = pd.DataFrame({"label": labels}, index=adata.obs_names)
        if of_batch is not None:
            adata.obs["batch"] = of_batch
        comparison = compare(
            vectors, adata, "label", batch_key=None if of_batch is None else "batch", k=settings.neighbours
        )
        table, verdict, baseline = comparison.table, comparison.verdict, "HVG + PCA"
    else:
        ours = cell_metrics(vectors, labels, batches=of_batch, k=settings.neighbours)
        table = pd.DataFrame({"metric": list(ours), "embedding": list(ours.values()), "baseline": math.nan})
        verdict, baseline = NO_BASELINE, "no counts"
    metrics = {
        row.metric: {"value": _finite(row.embedding), "baseline": _finite(row.baseline)} for row in table.itertuples()
    }
    if settings.compare_version:
        old = tables.embeddings(settings.embeddings, mode="cell", model_version=settings.compare_version)
        metrics |= _drift(_vectors_by_cell(old), _vectors_by_cell(found), settings)
    return EvaluateResult(
        metrics=metrics, verdict=verdict, cells=len(places), genes=0, baseline=baseline, table=settings.out or None
    ), found.model


def _kept(
    labels: np.ndarray, batches: np.ndarray | None, vectors: np.ndarray, settings: EvaluateSettings
) -> np.ndarray:
    """Return the positions of the cells to measure; log how many are left out, and why."""
    usable = np.array([label is not None for label in labels], bool)
    if batches is not None:
        usable &= np.array([batch is not None for batch in batches], bool)
    log_left_out(~usable, "no label" if batches is None else "no label or no batch")
    finite = np.isfinite(vectors).all(axis=1)
    log_left_out(usable & ~finite, "NaN or infinity in the vector")
    kept = np.flatnonzero(usable & finite)
    if len(kept) > settings.max_cells:
        logger.warning("a random sample of %s of %s cells is measured (--max-cells)",
                       f"{settings.max_cells:,}", f"{len(kept):,}")  # fmt: skip
        kept = np.sort(np.random.default_rng(0).choice(kept, settings.max_cells, replace=False))
    names, counts = np.unique(labels[kept].astype(str), return_counts=True)
    rare = names[counts < FOLDS]
    if len(rare):
        shown = ", ".join(map(repr, rare[:5].tolist()))
        logger.warning("labels of fewer than %d cells are left out: %s", FOLDS, shown)
        kept = kept[~np.isin(labels[kept].astype(str), rare)]
    if len(names) - len(rare) < 2:
        raise ConfigError(
            f"{settings.obs}: column {settings.label_column!r} has {plural(len(names) - len(rare), 'label')} of at "
            f"least {FOLDS} cells among the embedded cells; two are needed"
        )
    return kept


def _vectors_by_cell(found: Embeddings) -> pd.DataFrame:
    keys = pd.MultiIndex.from_frame(found.frame()[["adata_id", "cell_id"]])
    return pd.DataFrame(found.vectors, index=keys)


def _genes(settings: EvaluateSettings, tables: AnalysisTables) -> tuple[EvaluateResult, Any]:
    if settings.obs:
        raise ConfigError(
            f"{settings.embeddings} has gene embeddings, which --obs does not apply to: omit it, "
            "gene families measure them"
        )
    found = gene_vectors(tables, settings.embeddings, mode=settings.mode, model_version=settings.model_version)
    old = None
    if settings.compare_version:
        old = gene_vectors(
            tables, settings.embeddings, mode=found.model["mode"], model_version=settings.compare_version
        )
    metrics: dict[str, dict[str, float | None]] = {}
    for group, of_group in found.groups.items():
        start = f"{group}: " if group else ""
        for row in gene_family_recall(of_group).itertuples():
            metrics[f"{start}{row.family}"] = {"value": _finite(row.recall), "baseline": _finite(row.permuted)}
        if old is not None and group in old.groups:
            moved = _drift(old.groups[group], of_group, settings)
            metrics |= {f"{start}{name}": values for name, values in moved.items()}
    return EvaluateResult(
        metrics=metrics, verdict=_verdict_of_genes(metrics, found.count), cells=0, genes=found.count,
        baseline="permuted names", table=settings.out or None,
    ), found.model  # fmt: skip


def _verdict_of_genes(metrics: dict[str, dict[str, float | None]], genes: int) -> str:
    pairs = [(values["value"], values["baseline"]) for values in metrics.values()]
    recalls = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    if not recalls:
        return f"These {genes:,} genes include no family of three genes or more, so families cannot be measured."
    ours, theirs = np.mean(recalls, axis=0)
    return (
        f"Among the 10 nearest of these {genes:,} genes, {ours:.0%} of a gene's family are found on average, "
        f"{theirs:.0%} with permuted names."
    )


def _drift(old: pd.DataFrame, new: pd.DataFrame, settings: EvaluateSettings) -> dict[str, dict[str, float | None]]:
    """Measure how the vectors of the cells or genes that both versions have differ."""
    both = new.index.intersection(old.index, sort=False)
    if len(both) <= settings.neighbours:
        raise ConfigError(
            f"{settings.embeddings}: {len(both)} cells or genes have vectors of both versions, too few to compare them"
        )
    if len(both) > settings.max_cells:
        both = both[np.sort(np.random.default_rng(0).choice(len(both), settings.max_cells, replace=False))]
    moved = drift(old.loc[both].to_numpy(), new.loc[both].to_numpy(), k=settings.neighbours)
    return {f"drift_{name}": {"value": _finite(value), "baseline": None} for name, value in moved.items()}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

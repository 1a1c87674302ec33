"""`report`: a page about the embeddings of one or several tables."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import scanpy as sc

from scgpt_batch.analysis.programs import find_programs, score_programs
from scgpt_batch.cli.analysis_tables import AnalysisTables
from scgpt_batch.cli.cell_sources import Cells, read_cells
from scgpt_batch.cli.evaluate import evaluate
from scgpt_batch.cli.gene_vectors import gene_vectors
from scgpt_batch.command_result import CommandResult
from scgpt_batch.embedding_tables import table_path
from scgpt_batch.errors import ConfigError, listed
from scgpt_batch.io.locations import local_path
from scgpt_batch.report import figures
from scgpt_batch.report.movement import mean_vectors
from scgpt_batch.report.page import CellVectors, Contents, Evaluation, GeneVectors, Vectors, compute, render
from scgpt_batch.settings import EvaluateSettings, ReportSettings
from scgpt_batch.webpage import page as webpage

logger = logging.getLogger(__name__)

PROGRAM_GENES = 4_000  # of more genes, a sample is clustered: up to 4,095 the neighbours are found exactly
PROGRAM_SEEDS = 3  # clusterings from which stability is measured; `programs` takes ten
SCORED_CELLS, SCORED_PROGRAMS = 3_000, 60
MEASURED_CELLS = 4_000  # of the evaluation, as for the genes

# Columns by which a table is recognised, in this order
KINDS = {
    "cell embeddings": {"embedding", "cell_id", "model_name"},
    "gene embeddings": {"embedding", "gene", "model_name"},
    "program scores": {"program", "score"},
    "gene programs": {"program", "gene", "rank"},
    "annotations": {"cell_id", "label", "confidence"},
    "evaluations": {"metric", "value", "baseline"},
}


@dataclass(frozen=True, kw_only=True)
class ReportResult(CommandResult):
    """What was written."""

    report: str
    figures: list[str]
    cells: int
    genes: int

    def lines(self) -> list[str]:
        """Name the files."""
        return [f"report: {self.report}", *(f"figure: {figure}" for figure in self.figures)]


def report(settings: ReportSettings) -> ReportResult:
    """Write the page, and static figures on request.

    Raises
    ------
    ConfigError
        A table, file or column does not exist, a table is of no known kind, or the page cannot be written.
    """
    webpage.check(settings.report)
    contents = _Reader(settings, AnalysisTables(settings.spark_conf)).contents()
    found = compute(contents)
    webpage.write(settings.report, render(found))
    drawn = []
    if settings.format != "html":
        drawn = figures.write(found, local_path(settings.report, "report"), settings.format)
    return ReportResult(
        report=settings.report,
        figures=[str(path) for path in drawn],
        cells=0 if contents.cells is None else contents.cells.of.count,
        genes=0 if found.genes is None else len(found.genes.genes),
    )


class _Reader:
    """Reads what the settings name, and computes programs, scores and figures that no table has."""

    def __init__(self, settings: ReportSettings, tables: AnalysisTables) -> None:
        self.settings, self.tables = settings, tables
        self.notes: list[str] = []
        self.named: dict[str, list[str]] = {kind: [] for kind in KINDS}
        for table in settings.embeddings:
            self.named[_kind(table, tables.columns(table))].append(table)
        if len(self.named["cell embeddings"]) > 1:
            raise ConfigError(f"--embeddings has several tables of cell embeddings: {self._list('cell embeddings')}")

    def contents(self) -> Contents:
        """Return what the page shows."""
        genes = [found for table in self.named["gene embeddings"] for found in self._genes(table)]
        programs, note = self._programs(genes)
        source = read_cells(self.settings.obs, self.tables) if self.settings.obs else None
        cells, places = self._cells(source)
        scores, group_scores, scores_note = self._scores(cells, source, places, programs, genes)
        if cells is not None and scores is not None:
            cells = replace(cells, scores=scores)
        if not genes and cells is None:
            raise ConfigError("--embeddings has no table of cell or gene embeddings: add one")
        return Contents(
            cells=cells,
            genes=genes,
            programs=programs,
            programs_note=note,
            group_scores=group_scores,
            scores_note=scores_note,
            label_column=self.settings.label_column,
            evaluations=self._evaluations(cells),
            ledger=self._ledger(),
            runs=self._beside("_runs", lambda runs: runs),
            notes=self.notes,
        )

    def _list(self, kind: str) -> str:
        return listed(self.named[kind])

    # Vectors

    def _genes(self, table: str) -> list[GeneVectors]:
        found = []
        for mode in sorted(self.tables.values(table, "mode"), reverse=True):  # static ones first
            vectors = gene_vectors(self.tables, table, mode=mode, model_version=self.settings.model_version)
            groups = vectors.groups
            count = len(set().union(*(of_group.index for of_group in groups.values())))
            dimension = next(iter(groups.values())).shape[1]
            found.append(GeneVectors(Vectors(table, vectors.model, count, dimension), groups))
        return found

    def _cells(self, source: Cells | None) -> tuple[CellVectors | None, np.ndarray | None]:
        if not self.named["cell embeddings"]:
            return None, None
        (table,) = self.named["cell embeddings"]
        found = self.tables.embeddings(table, mode="cell", model_version=self.settings.model_version)
        lines, vectors = found.frame()[["adata_id", "cell_id"]], found.vectors
        places = source.places(lines, table) if source is not None else None
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            self.notes.append(f"{int((~finite).sum()):,} cells with NaN or infinity in their vectors are left out.")
            lines, vectors = lines[finite].reset_index(drop=True), vectors[finite]
            places = None if places is None else places[finite]
        obs = pd.DataFrame(index=lines.index)
        if source is not None and places is not None:
            obs = source.obs.iloc[np.maximum(places, 0)].reset_index(drop=True)
            obs = obs.where(pd.Series(places >= 0), other=None) if (places < 0).any() else obs
            obs = obs.drop(columns=[name for name in ("cell_id", "adata_id") if name in obs])
            if self.settings.label_column:
                obs[self.settings.label_column] = source.labels(self.settings.label_column, places)
        for annotations in self.named["annotations"]:
            columns = ["adata_id", "cell_id", "label", "confidence"]
            labels = self._newest(annotations, columns).drop_duplicates(["adata_id", "cell_id"], keep="last")
            matched = lines.merge(labels, on=["adata_id", "cell_id"], how="left")
            obs["predicted label"], obs["confidence"] = matched["label"], matched["confidence"]
        if "adata_id" in lines and lines["adata_id"].nunique() > 1:
            obs["row (adata_id)"] = lines["adata_id"]
        of = Vectors(table, found.model, len(vectors), vectors.shape[1])
        return CellVectors(of, vectors, lines["cell_id"].to_numpy(dtype=object), obs, pd.DataFrame()), places

    # Programs and scores

    def _programs(self, genes: list[GeneVectors]) -> tuple[pd.DataFrame | None, str]:
        if self.named["gene programs"]:
            columns = ["program", "gene", "rank", "stability"]
            parts = [self._newest(table, columns) for table in self.named["gene programs"]]
            return pd.concat(parts, ignore_index=True), f"From {self._list('gene programs')}."
        if not genes:
            return None, ""
        first = next((each for each in genes if None in each.groups), genes[0])
        vectors = mean_vectors(first.groups)
        note = f"Computed for this page from the {first.of.model['mode']} vectors, as scgpt-batch programs does."
        if len(vectors) > PROGRAM_GENES:
            chosen = np.sort(np.random.default_rng(0).choice(len(vectors), PROGRAM_GENES, replace=False))
            note += (
                f" Of {len(vectors):,} genes a random sample of {PROGRAM_GENES:,} was clustered; the others are in no "
                "program. Give the table of scgpt-batch programs to show programs of all genes."
            )
            vectors = vectors.iloc[chosen]
        if len(vectors) <= 5:
            return None, ""
        logger.info("clustering %s genes into programs", f"{len(vectors):,}")
        return find_programs(vectors, n_seeds=PROGRAM_SEEDS), note

    def _scores(
        self,
        cells: CellVectors | None,
        source: Cells | None,
        places: np.ndarray | None,
        programs: pd.DataFrame | None,
        genes: list[GeneVectors],
    ) -> tuple[pd.DataFrame | None, pd.DataFrame | None, str]:
        """Return scores of cells, mean scores of groups, and where they are from."""
        if self.named["program scores"]:
            return self._stored_scores(cells)
        if programs is None or not len(programs) or source is None or places is None or not source.have_counts:
            return None, None, ""
        assert cells is not None
        known = np.flatnonzero(places >= 0)
        chosen = known
        if len(known) > SCORED_CELLS:
            chosen = np.sort(np.random.default_rng(0).choice(known, SCORED_CELLS, replace=False))
        adata = source.counts(places[chosen])
        clustered = set().union(*(of_group.index for each in genes for of_group in each.groups.values()))
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
        adata = adata[:, adata.var_names.isin(clustered)].copy()
        first = programs["program"].drop_duplicates().head(SCORED_PROGRAMS)
        scores = score_programs(adata, programs[programs["program"].isin(first)])
        all_scores = pd.DataFrame(scores.to_numpy(), index=chosen, columns=scores.columns)
        all_scores = all_scores.reindex(np.arange(len(places)))
        note = f"Scores of {len(chosen):,} of {len(places):,} cells, computed for this page from {source.source}."
        return all_scores, self._group_means(cells, all_scores), note

    def _stored_scores(self, cells: CellVectors | None) -> tuple[pd.DataFrame | None, pd.DataFrame | None, str]:
        columns = ["adata_id", "cell_id", "group", "program", "score"]
        found = pd.concat([self._newest(table, columns) for table in self.named["program scores"]])
        note = f"From {self._list('program scores')}."
        of_groups = found[found["group"].notna()]
        group_scores = None
        if len(of_groups):
            group_scores = of_groups.pivot_table(index="group", columns="program", values="score", sort=False)
        of_cells = found[found["cell_id"].notna()]
        if not len(of_cells) or cells is None:
            return None, group_scores, note
        wide = of_cells.pivot_table(index="cell_id", columns="program", values="score", sort=False)
        scores = wide.reindex(pd.Index(cells.names)).reset_index(drop=True)
        return scores, group_scores if group_scores is not None else self._group_means(cells, scores), note

    def _group_means(self, cells: CellVectors, scores: pd.DataFrame) -> pd.DataFrame | None:
        label = self.settings.label_column
        return scores.groupby(cells.obs[label].to_numpy()).mean() if label else None

    # Evaluation, ledger, runs

    def _evaluations(self, cells: CellVectors | None) -> list[Evaluation]:
        found = []
        for table in self.named["evaluations"]:
            lines = self._newest(table, ["metric", "value", "baseline", "label_column"])
            for column, of_column in lines.groupby("label_column", dropna=False, sort=True):
                of_genes = column is None or pd.isna(column) or not column
                baseline = "permuted names" if of_genes else "HVG + PCA"
                what = "Gene families" if of_genes else f"Labels in column {column}"
                found.append(Evaluation(of_column, baseline, "", f"{what}, from {table}."))
        if found or cells is None or not self.settings.label_column:
            return found
        result = evaluate(EvaluateSettings.model_validate({
            "embeddings": cells.of.source, "obs": self.settings.obs, "label_column": self.settings.label_column,
            "model_version": self.settings.model_version, "max_cells": MEASURED_CELLS,
            "spark_conf": self.settings.spark_conf,
        }))  # fmt: skip
        rows = [(name, values["value"], values["baseline"]) for name, values in result.metrics.items()]
        table_ = pd.DataFrame(rows, columns=["metric", "value", "baseline"])
        baseline = result.baseline if table_["baseline"].notna().any() else ""
        source = f"Column {self.settings.label_column} of {self.settings.obs}, {result.cells:,} cells."
        return [Evaluation(table_, baseline, result.verdict, source)]

    def _ledger(self) -> pd.DataFrame | None:
        """Return the last line of each row, for the modes and models that the page shows."""
        keys = ["adata_id", "mode", "model_name", "model_version", "params_hash"]
        return self._beside("_ledger", lambda lines: lines.sort_values("at").drop_duplicates(keys, keep="last"))

    def _beside(self, suffix: str, of_table: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame | None:
        parts = []
        for table in [*self.named["cell embeddings"], *self.named["gene embeddings"]]:
            path = table_path(table)
            name = f"{table}{suffix}" if path is None else f"delta.`{path.rstrip('/')}{suffix}`"
            try:
                columns = self.tables.columns(name)
            except ConfigError as exc:  # tables of other writers have none beside them
                self.notes.append(f"No {suffix.strip('_')} table: {exc}.")
                continue
            parts.append(of_table(self.tables.read(name, columns).to_pandas()))
        return pd.concat(parts, ignore_index=True) if parts else None

    def _newest(self, table: str, columns: list[str]) -> pd.DataFrame:
        """Read the lines of the run that wrote last."""
        known = self.tables.columns(table)
        wanted = [name for name in columns if name in known]
        stamps = [name for name in ("written_at", "run_id") if name in known]
        lines: pa.Table = self.tables.read(table, [*wanted, *stamps])
        frame = lines.to_pandas()
        if stamps == ["written_at", "run_id"] and len(frame):
            frame = frame[frame["run_id"] == frame.loc[frame["written_at"].idxmax(), "run_id"]]
        return frame.reindex(columns=columns).reset_index(drop=True)


def _kind(table: str, columns: list[str]) -> str:
    kind = next((kind for kind, needed in KINDS.items() if needed <= set(columns)), None)
    if kind is None:
        raise ConfigError(
            f"{table} is not a table that the report can show ({', '.join(KINDS)}); its columns: {listed(columns)}"
        )
    return kind

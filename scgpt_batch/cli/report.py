"""`report`: a page about the embeddings of one or several tables."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module

import numpy as np
import pandas as pd
import pyarrow as pa

from scgpt_batch.analysis.evaluate import verdict
from scgpt_batch.analysis.gene_vectors import GeneVectors
from scgpt_batch.analysis.programs import find_programs, score_programs
from scgpt_batch.cli.analysis_tables import AnalysisTables
from scgpt_batch.cli.cell_sources import Cells, read_cells
from scgpt_batch.cli.evaluate import evaluate
from scgpt_batch.cli.gene_vectors import gene_vectors
from scgpt_batch.cli.programs import log_normalised
from scgpt_batch.command_result import CommandResult
from scgpt_batch.embedding_tables import MODEL
from scgpt_batch.errors import ConfigError, ScgptBatchError, listed
from scgpt_batch.io.locations import local_path
from scgpt_batch.report import figures
from scgpt_batch.report.movement import mean_vectors
from scgpt_batch.report.page import CellVectors, Contents, Evaluation, compute, render
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
    contents = read_contents(settings)
    found = compute(contents)
    webpage.write(settings.report, render(found))
    drawn = []
    if settings.format != "html":
        drawn = figures.write(found, local_path(settings.report, "report"), settings.format)
    return ReportResult(
        report=settings.report,
        figures=[str(path) for path in drawn],
        cells=0 if contents.cells is None else contents.cells.count,
        genes=0 if found.genes is None else len(found.genes.genes),
    )


def read_contents(settings: ReportSettings) -> Contents:
    """Return what the page shows, from the tables and files that the settings name.

    Raises
    ------
    ConfigError
        A table, file or column does not exist, or a table is of no known kind.
    """
    reader = _Reader(settings, AnalysisTables(settings.spark_conf))
    with ThreadPoolExecutor(1) as background:
        # umap compiles for seconds when it is imported; where it is used, an error of the import is raised again
        background.submit(import_module, "umap")
        return reader.contents()


class _Reader:
    """Reads what the settings name, and computes programs, scores and figures that no table has."""

    def __init__(self, settings: ReportSettings, tables: AnalysisTables) -> None:
        self.settings, self.tables = settings, tables
        self.notes: list[str] = []
        self.versions: set[tuple[str, str]] = set()  # model name and version of the page's vectors
        self.named: dict[str, list[str]] = {kind: [] for kind in KINDS}
        for table in settings.embeddings:
            self.named[_kind(table, tables.columns(table))].append(table)
        if len(self.named["cell embeddings"]) > 1:
            raise ConfigError(f"--embeddings has several tables of cell embeddings: {self._list('cell embeddings')}")

    def contents(self) -> Contents:
        """Return what the page shows."""
        genes = [found for table in self.named["gene embeddings"] for found in self._genes(table)]
        source = read_cells(self.settings.obs, self.tables) if self.settings.obs else None
        cells, lines, places = self._cells(source)
        programs, note = self._programs(genes)
        scores, group_scores, scores_note = self._scores(cells, lines, source, places, programs, genes)
        if cells is not None and scores is not None:
            cells = replace(cells, scores=scores)
        if not genes and cells is None:
            raise ConfigError("--embeddings has no table of cell or gene embeddings: add one")
        models = pd.DataFrame([dict(each.model) for each in (*genes, *([cells] if cells else ()))])
        return Contents(
            cells=cells,
            genes=genes,
            programs=programs,
            programs_note=note,
            group_scores=group_scores,
            scores_note=scores_note,
            label_column=self.settings.label_column,
            evaluations=self._evaluations(cells),
            ledger=self._ledger(models),
            runs=self._beside("_runs", lambda runs: runs),
            notes=self.notes,
        )

    def _list(self, kind: str) -> str:
        return listed(self.named[kind])

    # Vectors

    def _genes(self, table: str) -> list[GeneVectors]:
        found = []
        for mode in sorted(self.tables.values(table, "mode"), reverse=True):  # static ones first
            try:
                vectors = gene_vectors(self.tables, table, mode=mode, model_version=self.settings.model_version)
            except ConfigError as exc:
                if not self.settings.model_version:
                    raise
                self.notes.append(f"No {mode} vectors of {table}: {exc}.")
                continue
            self.versions.add((vectors.model["model_name"], vectors.model["model_version"]))
            found.append(vectors)
        return found

    def _cells(self, source: Cells | None) -> tuple[CellVectors | None, pd.DataFrame, np.ndarray | None]:
        """Return the cells, their adata_id and cell_id, and where they are in the source."""
        if not self.named["cell embeddings"]:
            return None, pd.DataFrame(), None
        (table,) = self.named["cell embeddings"]
        found = self.tables.embeddings(table, mode="cell", model_version=self.settings.model_version)
        self.versions.add((found.model["model_name"], found.model["model_version"]))
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
            labels = self._lines(annotations, columns)[columns]
            labels = labels.drop_duplicates(["adata_id", "cell_id"], keep="last")
            matched = lines.merge(labels, on=["adata_id", "cell_id"], how="left")
            of_table = f" ({annotations})" if len(self.named["annotations"]) > 1 else ""
            obs[f"predicted label{of_table}"] = matched["label"]
            obs[f"confidence{of_table}"] = matched["confidence"]
        if "adata_id" in lines and lines["adata_id"].nunique() > 1:
            obs["row (adata_id)"] = lines["adata_id"]
        names = lines["cell_id"].to_numpy(dtype=object)
        return CellVectors(table, found.model, vectors, names, obs, pd.DataFrame()), lines, places

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
        note = f"Computed for this page from the {first.model['mode']} vectors, as scgpt-batch programs does."
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
        lines: pd.DataFrame,
        source: Cells | None,
        places: np.ndarray | None,
        programs: pd.DataFrame | None,
        genes: list[GeneVectors],
    ) -> tuple[pd.DataFrame | None, pd.DataFrame | None, str]:
        """Return scores of cells, mean scores of groups, and where they are from."""
        if self.named["program scores"]:
            return self._stored_scores(cells, lines)
        if programs is None or not len(programs) or source is None or places is None or not source.have_counts:
            return None, None, ""
        assert cells is not None
        known = np.flatnonzero(places >= 0)
        chosen = known
        if len(known) > SCORED_CELLS:
            chosen = np.sort(np.random.default_rng(0).choice(known, SCORED_CELLS, replace=False))
        adata = source.counts(places[chosen])
        clustered = set().union(*(each.genes for each in genes))
        adata = log_normalised(adata)
        if clustered:  # control genes are drawn from these
            adata = adata[:, adata.var_names.isin(clustered)].copy()
        programs = programs[programs["gene"].isin(adata.var_names)]
        if not len(programs):
            self.notes.append(f"No gene of the programs is among the genes of {source.source}, so there are no scores.")
            return None, None, ""
        first = programs["program"].drop_duplicates().head(SCORED_PROGRAMS)
        scores = score_programs(adata, programs[programs["program"].isin(first)])
        all_scores = pd.DataFrame(scores.to_numpy(), index=chosen, columns=scores.columns)
        all_scores = all_scores.reindex(np.arange(len(places)))
        note = f"Scores of {len(chosen):,} of {len(places):,} cells, computed for this page from {source.source}."
        return all_scores, self._group_means(cells, all_scores), note

    def _stored_scores(
        self, cells: CellVectors | None, lines: pd.DataFrame
    ) -> tuple[pd.DataFrame | None, pd.DataFrame | None, str]:
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
        keys = ["adata_id", "cell_id"] if of_cells["adata_id"].notna().all() else ["cell_id"]
        if len(keys) == 1 and lines["cell_id"].duplicated().any():
            self.notes.append("Cell names are repeated, and the scores do not say of which row a cell is: not shown.")
            return None, group_scores, note
        wide = of_cells.pivot_table(index=keys, columns="program", values="score", sort=False)
        wanted = pd.MultiIndex.from_frame(lines) if len(keys) == 2 else pd.Index(lines["cell_id"])
        scores = wide.reindex(wanted).reset_index(drop=True)
        return scores, group_scores if group_scores is not None else self._group_means(cells, scores), note

    def _group_means(self, cells: CellVectors, scores: pd.DataFrame) -> pd.DataFrame | None:
        label = self.settings.label_column
        return scores.groupby(cells.obs[label].to_numpy()).mean() if label else None

    # Evaluation, ledger, runs

    def _evaluations(self, cells: CellVectors | None) -> list[Evaluation]:
        found = []
        for table in self.named["evaluations"]:
            lines = self._newest(table, ["metric", "value", "baseline", "label_column"], by="label_column")
            for column, of_column in lines.groupby("label_column", dropna=False, sort=True):
                of_genes = column is None or pd.isna(column) or not column
                baseline = "permuted names" if of_genes else "HVG + PCA"
                what = "Gene families" if of_genes else f"Labels in column {column}"
                found.append(Evaluation(of_column, baseline, _verdict(of_column), f"{what}, from {table}."))
        if found or cells is None or not self.settings.label_column:
            return found
        try:
            result = evaluate(EvaluateSettings.model_validate({
                "embeddings": cells.source, "obs": self.settings.obs, "label_column": self.settings.label_column,
                "model_version": self.settings.model_version, "max_cells": MEASURED_CELLS,
                "spark_conf": self.settings.spark_conf,
            }))  # fmt: skip
        except ScgptBatchError as exc:  # such as one label only, by which a map can still be coloured
            self.notes.append(f"The cells are not evaluated: {exc}.")
            return []
        rows = [(name, values["value"], values["baseline"]) for name, values in result.metrics.items()]
        table_ = pd.DataFrame(rows, columns=["metric", "value", "baseline"])
        baseline = result.baseline if table_["baseline"].notna().any() else ""
        source = f"Column {self.settings.label_column} of {self.settings.obs}, {result.cells:,} cells."
        return [Evaluation(table_, baseline, result.verdict, source)]

    def _ledger(self, models: pd.DataFrame) -> pd.DataFrame | None:
        """Return the last line of each row, for the modes and models that the page shows."""
        shown = models[[*MODEL]].drop_duplicates()

        def newest(lines: pd.DataFrame) -> pd.DataFrame:
            return lines.merge(shown, on=[*MODEL]).sort_values("at").drop_duplicates(["adata_id", *MODEL], keep="last")

        return self._beside("_ledger", newest)

    def _beside(self, suffix: str, of_table: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame | None:
        parts = []
        for table in [*self.named["cell embeddings"], *self.named["gene embeddings"]]:
            name = self.tables.beside(table, suffix)
            try:
                columns = self.tables.columns(name)
            except ConfigError as exc:  # tables of other writers have none beside them
                self.notes.append(f"No {suffix.strip('_')} table: {exc}.")
                continue
            parts.append(of_table(self.tables.read(name, columns).to_pandas()))
        return pd.concat(parts, ignore_index=True) if parts else None

    def _newest(self, table: str, columns: list[str], *, by: str = "") -> pd.DataFrame:
        """Read the lines of the run that wrote last, or of the last run for each value of a column.

        Lines about other versions than those of the page's vectors are left out.
        """
        frame = self._lines(table, columns)
        if "run_id" in frame and len(frame):
            runs = frame.groupby(frame[by] if by else np.zeros(len(frame)), dropna=False)["run_id"]
            frame = frame[frame["run_id"] == runs.transform("last")]
        return frame.reindex(columns=columns).reset_index(drop=True)

    def _lines(self, table: str, columns: list[str]) -> pd.DataFrame:
        """Read the lines about the page's versions, last written last."""
        known = self.tables.columns(table)
        stamps = ["model_name", "model_version", "written_at", "run_id"]
        lines: pa.Table = self.tables.read(table, [name for name in (*columns, *stamps) if name in known])
        frame = lines.to_pandas()
        if {"model_name", "model_version"} <= set(known):
            shown = pd.MultiIndex.from_frame(frame[["model_name", "model_version"]]).isin(list(self.versions))
            if len(frame) and not shown.any():
                self.notes.append(f"{table} has no lines about the model version of this page.")
            frame = frame[shown]
        return frame.sort_values("written_at", kind="stable") if "written_at" in frame else frame


def _verdict(figures: pd.DataFrame) -> str:
    """Return the verdict of stored figures of cells beside their baseline; nothing for other figures."""
    known = figures.dropna(subset=["value", "baseline"]).set_index("metric")
    if not {"avg_bio", "knn_accuracy"} <= set(known.index):
        return ""
    return verdict(known["value"].to_dict(), known["baseline"].to_dict())


def _kind(table: str, columns: list[str]) -> str:
    kind = next((kind for kind, needed in KINDS.items() if needed <= set(columns)), None)
    if kind is None:
        raise ConfigError(
            f"{table} is not a table that the report can show ({', '.join(KINDS)}); its columns: {listed(columns)}"
        )
    return kind

"""`programs`: gene programs of a table of gene embeddings, their scores in cells, and their enrichment in gene sets."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import scanpy as sc

from scgpt_batch.analysis.enrichment import enrich, read_gmt
from scgpt_batch.analysis.gene_vectors import GeneVectors
from scgpt_batch.analysis.programs import find_programs, score_programs
from scgpt_batch.cli.analysis_tables import GENE_PROGRAMS, PROGRAM_ENRICHMENT, PROGRAM_SCORES, AnalysisTables
from scgpt_batch.cli.cell_sources import Cells, are_counts, read_cells
from scgpt_batch.cli.gene_vectors import gene_vectors
from scgpt_batch.command_result import CommandResult, plural
from scgpt_batch.errors import ConfigError
from scgpt_batch.io.locations import local_path
from scgpt_batch.settings import ProgramsSettings

logger = logging.getLogger(__name__)

SHOWN_PROGRAMS, SHOWN_GENES = 8, 8
SIGNIFICANT = 0.05  # adjusted p value of a term that is shown


@dataclass(frozen=True, kw_only=True)
class ProgramsResult(CommandResult):
    """The programs that were found."""

    programs: int
    genes: int
    table: str
    scores_table: str | None
    scores: int
    enrichment_table: str | None
    shown: list[tuple[str, int, float, list[str], str]] = field(repr=False)  # program, genes, stability, first, notes

    def to_dict(self) -> dict[str, Any]:
        """Return the values of the JSON line."""
        values = super().to_dict()
        del values["shown"]
        return values

    def lines(self) -> list[str]:
        """Show the first programs."""
        lines = [f"{plural(self.programs, 'program')} of {plural(self.genes, 'gene')} in {self.table}"]
        for program, size, stability, genes, notes in self.shown:
            more = "" if size <= SHOWN_GENES else " …"
            named = f"  ({notes})" if notes else ""
            lines.append(f"  {program:<5} {size:>5,} genes, stability {stability:.2f}: {' '.join(genes)}{more}{named}")
        if self.programs > len(self.shown):
            lines.append(f"  and {plural(self.programs - len(self.shown), 'further program')}")
        if self.scores_table:
            lines.append(f"{plural(self.scores, 'score')} in {self.scores_table}")
        if self.enrichment_table:
            lines.append(f"enrichment in gene sets in {self.enrichment_table}")
        return lines


def programs(settings: ProgramsSettings) -> ProgramsResult:
    """Cluster the gene vectors of a table into programs, and write them; with `cells` also their scores.

    Raises
    ------
    ConfigError
        A table, file or column does not exist, or no cluster is large enough.
    """
    tables = AnalysisTables(settings.spark_conf)
    sets = read_gmt(local_path(settings.gmt, "gmt")) if settings.gmt else None
    cells = read_cells(settings.cells, tables) if settings.cells else None
    groups = cells.labels(settings.group_by) if cells and settings.group_by else None
    vectors = gene_vectors(tables, settings.embeddings, mode=settings.mode, model_version=settings.model_version)
    found = _find(vectors, settings)
    params = settings.model_dump(include={"resolution", "neighbours", "min_genes", "seeds"})
    constants = tables.made_of(settings.embeddings, vectors.model, params)
    members = {name: table["gene"].tolist() for name, table in found.groupby("program", sort=False)}
    enriched = None if sets is None else _enriched(found, vectors, sets)
    scores = None if cells is None else _scores(cells, groups, members, vectors, settings)
    tables.replace(settings.out, GENE_PROGRAMS, pa.Table.from_pandas(found, preserve_index=False), constants)
    scores_table = enrichment_table = None
    if enriched is not None:
        enrichment_table = tables.beside(settings.out, "_enrichment")
        tables.replace(
            enrichment_table, PROGRAM_ENRICHMENT, pa.Table.from_pandas(enriched, preserve_index=False), constants
        )
    if scores is not None:
        scores_table = settings.scores_table or tables.beside(settings.out, "_scores")
        tables.replace(scores_table, PROGRAM_SCORES, scores, constants)
    return ProgramsResult(
        programs=len(members),
        genes=len(found),
        table=settings.out,
        scores_table=scores_table,
        scores=0 if scores is None else scores.num_rows,
        enrichment_table=enrichment_table,
        shown=_shown(found, enriched, scores if settings.group_by else None),
    )


def _find(vectors: GeneVectors, settings: ProgramsSettings) -> pd.DataFrame:
    """Return the programs of each group of contextual vectors, or those of static vectors."""
    parts = []
    for group, of_group in vectors.groups.items():
        if len(of_group) <= settings.min_genes and len(vectors.groups) > 1:
            logger.warning("group %r has vectors of %d genes only and gets no programs", group, len(of_group))
            continue
        logger.info("clustering %s genes%s", f"{len(of_group):,}", f" of group {group}" if group else "")
        table = find_programs(
            of_group,
            resolution=settings.resolution,
            n_neighbors=settings.neighbours,
            min_genes=settings.min_genes,
            n_seeds=settings.seeds,
        )
        if group is not None:  # names are unique in the table
            table["program"] = f"{group}: " + table["program"]
        parts.append(table.assign(group=pd.Series([group] * len(table), dtype=object)))
    found = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if not len(found):
        raise ConfigError(
            f"no cluster of the genes of {settings.embeddings} has {settings.min_genes} genes at resolution "
            f"{settings.resolution:g}: lower --resolution"
        )
    return found.astype({"rank": "int32"})


def _scores(
    cells: Cells,
    groups: np.ndarray | None,
    members: dict[str, Sequence[str]],
    vectors: GeneVectors,
    settings: ProgramsSettings,
) -> pa.Table:
    """Return one line per cell (or group of cells) and program."""
    adata = log_normalised(cells.counts())
    adata = adata[:, adata.var_names.isin(vectors.genes)].copy()  # control genes are drawn from the clustered ones
    if not adata.n_vars:
        raise ConfigError(
            f"no gene of {settings.cells} is among those of {settings.embeddings} (first: "
            f"{min(vectors.genes)!r}): are the names gene symbols?"
        )
    scores = score_programs(adata, members)
    if groups is None:
        names, adata_ids, labels = cells.obs.index.to_numpy(dtype=object), cells.adata_ids, None
    else:
        labelled = np.array([label is not None for label in groups], bool)
        scores = scores[labelled].groupby(groups[labelled]).mean()
        names, adata_ids, labels = None, None, scores.index.to_numpy(dtype=object)
    n, k = scores.shape

    def repeated(values: np.ndarray | None) -> pa.Array:
        return pa.nulls(n * k, pa.string()) if values is None else pa.array(np.repeat(values, k), pa.string())

    return pa.table({
        "adata_id": repeated(adata_ids), "cell_id": repeated(names), "group": repeated(labels),
        "program": pa.array(np.tile(scores.columns.to_numpy(dtype=object), n), pa.string()),
        "score": pa.array(scores.to_numpy().ravel()),
    })  # fmt: skip


def log_normalised(adata: ad.AnnData) -> ad.AnnData:
    """Return log(1 + counts per 10,000); values that are not counts are taken as they are."""
    if not are_counts(adata):
        logger.warning("the values of the cells to score are not counts; they are taken as logarithms")
        return adata
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata


def _enriched(found: pd.DataFrame, vectors: GeneVectors, sets: dict[str, list[str]]) -> pd.DataFrame:
    parts = []
    for group, of_group in vectors.groups.items():
        of_these = found[found["group"].isna() if group is None else found["group"] == group]
        members = {name: table["gene"].tolist() for name, table in of_these.groupby("program", sort=False)}
        if not members:  # too few genes to cluster
            continue
        parts.append(enrich(members, sets, list(of_group.index)).assign(group=group))
    table = pd.concat(parts, ignore_index=True)
    return table.astype({"term_genes": "int32", "group": object})


def _shown(
    found: pd.DataFrame, enriched: pd.DataFrame | None, scores_of_groups: pa.Table | None
) -> list[tuple[str, int, float, list[str], str]]:
    """Describe the first programs: with the group of the highest mean score, and the most significant gene set."""
    highest, terms = {}, {}
    if scores_of_groups is not None:
        frame = scores_of_groups.select(["program", "group", "score"]).to_pandas().sort_values("score")
        highest = frame.groupby("program")["group"].last().to_dict()
    if enriched is not None:
        best = enriched[enriched["p_adjusted"] <= SIGNIFICANT].drop_duplicates("program")
        terms = dict(zip(best["program"], best["term"], strict=True))
    tables = list(found.groupby("program", sort=False))[:SHOWN_PROGRAMS]
    shown = []
    for name, table in tables:
        group = f"highest in {highest[name]}" if name in highest else ""
        notes = ", ".join(filter(None, (group, terms.get(name))))
        genes, stability = table["gene"].tolist(), float(table["stability"].iloc[0])
        shown.append((_number(name), len(genes), stability, genes[:SHOWN_GENES], notes))
    return shown


def _number(program: str) -> str:
    """Return a program's name without its genes: `P1`, or `CD8 T: P1`."""
    return re.sub(r"(P\d+) .*", r"\1", program)

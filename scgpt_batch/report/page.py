"""The sections of the report and its page: what ran, cells, genes, programs, groups, evaluation, how it was made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from scgpt_batch.analysis.gene_vectors import GeneVectors
from scgpt_batch.report import maps
from scgpt_batch.report.movement import Movement, mean_vectors, movement
from scgpt_batch.report.neighbours import NearestGenes, nearest_genes
from scgpt_batch.report.projection import Projection, project
from scgpt_batch.webpage import page as webpage

DRAWN = 50_000  # points of a map
SHOWN_PROGRAMS, SHOWN_GENES = 60, 8
SHOWN_GROUPS = 40
SHOWN_RUNS, SHOWN_REASONS, SHOWN_MOVERS = 10, 20, 20
MANY_FAILED = 0.1  # share of rows; the default limit of `embed`

VIRIDIS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")


@dataclass(frozen=True)
class CellVectors:
    """Cell embeddings, and what is known of the cells.

    Attributes
    ----------
    source
        The table as it was named.
    model
        The columns mode, model_name, model_version and params_hash.
    vectors
        float32, (cells, d).
    names
        Of the cells.
    obs
        Columns to colour by, in the order of the vectors.
    scores
        Cells × programs; may have no columns.
    """

    source: str
    model: Mapping[str, str]
    vectors: np.ndarray
    names: np.ndarray
    obs: pd.DataFrame
    scores: pd.DataFrame

    @property
    def count(self) -> int:
        """The number of cells."""
        return len(self.vectors)

    @property
    def dimension(self) -> int:
        """The length of a vector."""
        return self.vectors.shape[1]


@dataclass(frozen=True)
class Evaluation:
    """Figures of an embedding.

    Attributes
    ----------
    table
        metric, value, baseline.
    baseline
        What the baseline is.
    verdict
        One sentence; may be empty.
    source
        Where the figures are from, in words.
    """

    table: pd.DataFrame
    baseline: str
    verdict: str
    source: str


@dataclass(frozen=True)
class Contents:
    """What the report shows. Parts without a table are None or empty.

    Attributes
    ----------
    ledger, runs
        Lines of the ledgers and runs of all tables.
    programs
        Columns program, gene, rank, stability.
    programs_note, scores_note
        Where programs and scores are from.
    group_scores
        Groups × programs: mean scores.
    label_column
        Column of the cells' obs that the map starts with.
    notes
        What a reader should know of how the page was made.
    """

    cells: CellVectors | None = None
    genes: list[GeneVectors] = field(default_factory=list)
    programs: pd.DataFrame | None = None
    programs_note: str = ""
    group_scores: pd.DataFrame | None = None
    scores_note: str = ""
    label_column: str = ""
    evaluations: list[Evaluation] = field(default_factory=list)
    ledger: pd.DataFrame | None = None
    runs: pd.DataFrame | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def vectors(self) -> list[CellVectors | GeneVectors]:
        """The vectors of cells and genes."""
        return [*([self.cells] if self.cells else []), *self.genes]


@dataclass(frozen=True)
class CellMap:
    """The map of cells, of those that are drawn."""

    projection: Projection
    places: np.ndarray  # of the drawn cells among all
    cells: CellVectors


@dataclass(frozen=True)
class GeneMap:
    """The map of genes, all of them; the drawn ones first. The panel starts with the gene at position `first`."""

    projection: Projection
    genes: pd.Index
    program: pd.Series
    first: int
    nearest: NearestGenes
    drawn: int
    of: GeneVectors


@dataclass(frozen=True)
class Report:
    """The contents with what was computed from them."""

    contents: Contents
    cells: CellMap | None
    genes: GeneMap | None
    movement: Movement | None


def compute(contents: Contents, *, seed: int = 0) -> Report:
    """Lay out the maps, find nearest genes, and compare groups."""
    genes, moved = None, None
    if contents.genes:
        # programs, neighbours and map are of one kind of vectors: static ones if there are any
        first = next((each for each in contents.genes if None in each.groups), contents.genes[0])
        genes = _gene_map(first, contents.programs, seed)
        moved = next((found for each in contents.genes if (found := movement(each.groups)) is not None), None)
    cells = None if contents.cells is None else _cell_map(contents.cells, seed)
    return Report(contents, cells, genes, moved)


def _cell_map(cells: CellVectors, seed: int) -> CellMap:
    places = np.arange(len(cells.vectors))
    if len(places) > DRAWN:
        places = np.sort(np.random.default_rng(seed).choice(len(places), DRAWN, replace=False))
    return CellMap(project(cells.vectors[places], seed=seed), places, cells)


def _gene_map(found: GeneVectors, programs: pd.DataFrame | None, seed: int) -> GeneMap:
    vectors = mean_vectors(found.groups)
    if len(vectors) > DRAWN:
        drawn = np.sort(np.random.default_rng(seed).choice(len(vectors), DRAWN, replace=False))
        vectors = vectors.iloc[np.concatenate([drawn, np.setdiff1d(np.arange(len(vectors)), drawn)])]
    x = vectors.to_numpy(np.float32)
    program = pd.Series(None, index=vectors.index, dtype=object)
    if programs is not None:
        first = programs.drop_duplicates("gene").set_index("gene")["program"]
        program = first.reindex(vectors.index)
    leading = [] if programs is None else programs["gene"].head(1).tolist()
    first_gene = vectors.index.get_indexer(leading)[0] if leading else 0
    return GeneMap(
        project(x, seed=seed), vectors.index, program, max(int(first_gene), 0), nearest_genes(x, seed=seed),
        min(len(x), DRAWN), found,
    )  # fmt: skip


def render(report: Report) -> str:
    """Return the page as text."""
    contents = report.contents
    sections = [{"id": "ran", "heading": "What ran"}]
    blocks: dict[str, Any] = {"ran": _ran(contents)}
    if report.cells is not None:
        sections.append({"id": "cells", "heading": "Cells"})
        blocks["cells"] = _cells(report.cells, contents)
    if report.genes is not None:
        sections.append({"id": "genes", "heading": "Genes"})
        blocks["genes"] = _genes(report)
    if contents.programs is not None and len(contents.programs):
        sections.append({"id": "programs", "heading": "Gene programs"})
        blocks["programs"] = _programs(contents)
    if report.movement is not None:
        sections.append({"id": "groups", "heading": "Genes between groups"})
        blocks["groups"] = _groups(report)
    if contents.evaluations:
        sections.append({"id": "evaluation", "heading": "Evaluation"})
        blocks["evaluation"] = [_evaluation(each) for each in contents.evaluations]
    sections.append({"id": "made", "heading": "How this page was made"})
    blocks["made"] = [*_how(report), *contents.notes]
    return webpage.render(
        "scgpt_batch.report",
        "page.html.j2",
        scripts=[webpage.source("scgpt_batch.report", "report.js")],
        style=webpage.source("scgpt_batch.report", "report.css"),
        sections=sections,
        blocks=blocks,
        title=_title(contents),
    )


def _title(contents: Contents) -> str:
    models = dict.fromkeys(f"{of.model['model_name']} version {of.model['model_version']}" for of in contents.vectors)
    return " and ".join(models) or "embeddings"


# What ran


def _ran(contents: Contents) -> dict[str, Any]:
    cards = []
    names = {"cell": "Cell vectors", "static": "Static gene vectors", "contextual": "Contextual gene vectors"}
    for of in contents.vectors:
        cards.append(_card(
            names[of.model["mode"]], f"{of.count:,} × {of.dimension:,}",
            f"{of.model['model_name']} version {of.model['model_version']}, parameters {of.model['params_hash'][:8]}. "
            f"Table {of.source}",
        ))  # fmt: skip
    ledger = contents.ledger
    reasons, warnings = None, None
    if ledger is not None and len(ledger):
        cards += _ledger_cards(ledger)
        reasons, warnings = _reasons(ledger), _warnings(ledger)
    runs = contents.runs
    return {
        "cards": cards,
        "reasons": reasons,
        "warnings": warnings,
        "has_ledger": ledger is not None and len(ledger) > 0,
        "runs": None if runs is None or not len(runs) else _runs(runs),
    }


def _card(label: str, value: str, note: str, state: str = "", verdict: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note, "state": state, "verdict": verdict}


def _ledger_cards(ledger: pd.DataFrame) -> list[dict[str, str]]:
    failed = int((ledger["status"] == "failed").sum())
    state = "ok" if not failed else "critical" if failed > MANY_FAILED * len(ledger) else "warning"
    verdict = {"ok": "All rows have a result.", "warning": "See the reasons below.", "critical": "Many rows failed."}
    cards = [_card("Failed rows", f"{failed:,} of {len(ledger):,}", "", state, verdict[state])]
    coverage = ledger["coverage"].dropna()
    if len(coverage):
        note = f"Median share of counts in genes of the vocabulary; the lowest row has {coverage.min():.1%}"
        cards.append(_card("Coverage", f"{coverage.median():.1%}", note))
    warned = ledger["warnings"].map(lambda found: 0 if found is None else len(found)) > 0
    state, verdict_ = ("warning", "See the messages below.") if warned.any() else ("ok", "None.")
    cards.append(_card("Rows with warnings", f"{int(warned.sum()):,}", "", state, verdict_))
    return cards


def _reasons(ledger: pd.DataFrame) -> list[list[Any]]:
    failed = ledger[ledger["status"] == "failed"]
    rows = []
    for name, lines in failed.groupby("error_class", dropna=False, sort=True):
        first = lines.sort_values("adata_id").iloc[0]
        rows.append([name, len(lines), first["adata_id"], first["error_message"]])
    return sorted(rows, key=lambda row: -row[1])[:SHOWN_REASONS]


def _warnings(ledger: pd.DataFrame) -> list[list[Any]]:
    lines = ledger[["adata_id", "warnings"]].explode("warnings").dropna(subset="warnings")
    rows = [[text, len(of_text), min(of_text["adata_id"])] for text, of_text in lines.groupby("warnings", sort=True)]
    return sorted(rows, key=lambda row: -row[1])[:SHOWN_REASONS]


def _runs(runs: pd.DataFrame) -> dict[str, Any]:
    names = [
        "started_at", "finished_at", "status", "mode", "model_uri", "rows_in", "rows_ok", "rows_failed", "rows_skipped",
        "cells", "embeddings", "seconds", "input_table", "run_id",
    ]  # fmt: skip
    shown = runs.sort_values("started_at", ascending=False, kind="stable").head(SHOWN_RUNS)
    columns = [name for name in names if name in shown]
    rows = [[_value(value) for value in row] for row in shown[columns].to_numpy(dtype=object)]
    return {"columns": columns, "rows": rows, "all": len(runs)}


def _value(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return None if np.isnan(value) else int(value) if value == int(value) else float(value)
    return value.item() if isinstance(value, np.generic) else value


# Cells


def _cells(found: CellMap, contents: Contents) -> dict[str, Any]:
    cells, places = found.cells, found.places
    columns, left_out = maps.columns(cells.obs.iloc[places])
    for name in cells.scores.columns:
        if len(columns) >= maps.MAX_COLUMNS:
            left_out.append(str(name))
        elif (scored := maps.column(f"score {name}", cells.scores[name].iloc[places])) is not None:
            columns.append(scored)
    columns.sort(key=lambda column: column["name"] != contents.label_column)  # stable: the label column first
    names = [str(name) for name in cells.names[places]]
    points = maps.PointMap("cell", names, found.projection.xy, len(places), columns)
    label = contents.label_column or next((c["name"] for c in columns if c["kind"] == "category"), "")
    return {
        "data": webpage.data_block(points.to_json()),
        "drawn": len(places),
        "all": len(cells.vectors),
        "has_columns": bool(columns),
        "left_out": left_out,
        "label": label,
        "counts": _counts(cells.obs[label]) if label in cells.obs else None,
    }


def _counts(values: pd.Series) -> list[list[Any]]:
    counts = values.dropna().astype(str).value_counts()
    counts = counts.sort_index().sort_values(ascending=False, kind="stable")
    return [[name, int(n), f"{n / len(values):.1%}"] for name, n in counts.head(maps.MAX_CATEGORIES).items()]


# Genes


def _genes(report: Report) -> dict[str, Any]:
    found = report.genes
    assert found is not None
    columns = []
    if (program := maps.column("program", found.program, short=True)) is not None:
        columns.append(program)
    points = maps.PointMap("gene", [str(gene) for gene in found.genes], found.projection.xy, found.drawn, columns)
    wide = len(found.genes) > np.iinfo(np.uint16).max
    data: dict[str, Any] = {
        "map": points.to_json(),
        "first": found.first,
        "neighbours": {
            "k": found.nearest.index.shape[1],
            "wide": wide,
            "index": maps.packed(found.nearest.index.astype(np.uint32 if wide else np.uint16)),
            "cosine": maps.packed(np.round(found.nearest.cosine * 10_000).astype(np.int16)),
        },
    }
    if report.movement is not None:
        data["groups"] = _group_cosines(report.movement, found.genes)
    return {
        "data": webpage.data_block(data),
        "drawn": found.drawn,
        "all": len(found.genes),
        "mode": found.of.model["mode"],
        "in_programs": int(found.program.notna().sum()),
        "has_columns": bool(columns),
    }


def _group_cosines(moved: Movement, genes: pd.Index) -> dict[str, Any]:
    groups = moved.groups[:SHOWN_GROUPS]
    place = moved.genes.get_indexer(genes)
    cosine = np.full((len(genes), len(groups)), np.nan, np.float32)
    cosine[place >= 0] = moved.cosine[place[place >= 0], : len(groups)]
    coded = np.where(np.isnan(cosine), -32_768, np.round(cosine * 10_000)).astype(np.int16)
    return {"names": groups, "cosine": maps.packed(coded)}


# Programs, groups, evaluation


def _programs(contents: Contents) -> dict[str, Any]:
    assert contents.programs is not None
    rows = []
    for name, table in contents.programs.groupby("program", sort=False):
        genes = table.sort_values("rank")["gene"].tolist()
        more = "" if len(genes) <= SHOWN_GENES else " …"
        stability = float(table["stability"].iloc[0]) if "stability" in table else float("nan")
        shown = "" if np.isnan(stability) else f"{stability:.2f}"
        rows.append([str(name), len(genes), shown, ", ".join(genes[:SHOWN_GENES]) + more])
    scores = contents.group_scores
    return {
        "rows": rows,
        "note": contents.programs_note,
        "heat": None if scores is None or not scores.size else heat_map(scores),
        "scores_note": contents.scores_note,
    }


def heat_map(scores: pd.DataFrame) -> dict[str, Any]:
    """Return a table of groups × programs as coloured cells, programs as rows."""
    names = [name for name in scores.columns if scores[name].notna().any()][:SHOWN_PROGRAMS]
    shown = scores[names].T
    values = shown.to_numpy(float)
    low, high = np.nanmin(values), np.nanmax(values)
    rows = []
    for name, row in zip(names, values, strict=True):
        rows.append({"name": str(name), "cells": [_tile(value, low, high) for value in row]})
    return {"groups": [str(group) for group in scores.index], "rows": rows, "all": scores.shape[1]}


def _tile(value: float, low: float, high: float) -> dict[str, str]:
    if np.isnan(value):
        return {"text": "", "back": "", "front": ""}
    share = (value - low) / max(high - low, 1e-12)
    at = share * (len(VIRIDIS) - 1)
    i = min(int(at), len(VIRIDIS) - 2)
    ends = [[int(colour[k : k + 2], 16) for k in (0, 2, 4)] for colour in VIRIDIS[i : i + 2]]
    mixed = [round(a + (b - a) * (at - i)) for a, b in zip(*ends, strict=True)]
    luminance = sum(w * (c / 255) ** 2.2 for w, c in zip((0.2126, 0.7152, 0.0722), mixed, strict=True))
    back = "#" + "".join(f"{c:02x}" for c in mixed)
    return {"text": f"{value:.2f}", "back": back, "front": "#000" if luminance > 0.18 else "#fff"}


def _groups(report: Report) -> dict[str, Any]:
    moved, genes = report.movement, report.genes
    assert moved is not None and genes is not None
    place = genes.genes.get_indexer(moved.table["gene"].head(SHOWN_MOVERS))
    rows = [
        {"gene": row.gene, "place": int(at), "groups": row.groups, "cosine": f"{row.least_cosine:.3f}",
         "pair": f"{row.group} and {row.other_group}"}
        for row, at in zip(moved.table.head(SHOWN_MOVERS).itertuples(), place, strict=True)
    ]  # fmt: skip
    return {"rows": rows, "groups": moved.groups, "genes": len(moved.table)}


def _evaluation(found: Evaluation) -> dict[str, Any]:
    rows = []
    for row in found.table.itertuples():
        value, baseline = (None if pd.isna(x) else float(x) for x in (row.value, row.baseline))
        rows.append({
            "metric": str(row.metric).replace("_", " "),
            "value": None if value is None else f"{value:.3f}",
            "baseline": None if baseline is None else f"{baseline:.3f}",
            "difference": None if value is None or baseline is None else f"{value - baseline:+.3f}",
            "widths": [0 if x is None else round(100 * min(max(x, 0), 1), 1) for x in (value, baseline)],
        })  # fmt: skip
    return {"rows": rows, "baseline": found.baseline, "verdict": found.verdict, "source": found.source}


# How this page was made


def _how(report: Report) -> list[str]:
    notes = []
    if report.cells is not None:
        n, drawn = len(report.cells.cells.vectors), len(report.cells.places)
        if drawn < n:
            notes.append(f"The map of cells shows {drawn:,} of {n:,} cells, drawn at random (seed 0).")
        notes.append(f"Map of cells: {report.cells.projection.described('cell')}")
    if report.genes is not None:
        genes = report.genes
        if genes.drawn < len(genes.genes):
            notes.append(
                f"The map of genes shows {genes.drawn:,} of {len(genes.genes):,} genes, drawn at random (seed 0); the "
                "search finds all of them."
            )
        notes.append(f"Map of genes: {genes.projection.described('gene')}")
        if genes.nearest.recall < 1:
            notes.append(
                "Nearest genes were searched in parts of the genes that are close to each other: "
                f"{genes.nearest.recall:.0%} of the true ones were found, measured on 200 genes. "
                "scgpt_batch.similar_genes searches exactly."
            )
    notes.append(
        "Distances between clusters and the sizes of clusters mean little in UMAP; only neighbours do. Values on the "
        "maps are rounded to 1/254 of their range."
    )
    return notes

"""The report's maps and heat map as static PNG or SVG files, for papers and slides."""

from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from scgpt_batch.report.page import Report

OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800")
MARKERS = "os^DP"
GREY = "#c4c7cc"
COLOURED = len(OKABE_ITO) * len(MARKERS)  # categories with a colour and marker of their own; smaller ones are grey


def write(report: Report, page: Path, format: Literal["png", "svg"]) -> list[Path]:
    """Write the figures beside the page: its name with `_cells`, `_genes` and `_programs`."""
    made: dict[str, Figure] = {}
    if report.cells is not None:
        label, obs = report.contents.label_column, report.cells.cells.obs
        values = obs[label].iloc[report.cells.places] if label in obs else None
        made["cells"] = _scatter(report.cells.projection.xy, values, "cells", label)
    if report.genes is not None:
        drawn = slice(0, report.genes.drawn)
        programs = report.genes.program.iloc[drawn]
        made["genes"] = _scatter(report.genes.projection.xy[drawn], programs, "genes", "program")
    if report.contents.group_scores is not None:
        made["programs"] = _heat_map(report.contents.group_scores)
    paths = []
    # text stays text in SVG, and a fixed salt makes equal figures equal files
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scgpt_batch"}):
        for name, figure in made.items():
            path = page.with_name(f"{page.stem}_{name}.{format}")
            metadata: dict[str, Any] = {"Date": None} if format == "svg" else {}
            figure.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)
            paths.append(path)
    return paths


def _scatter(xy: np.ndarray, values: pd.Series | None, noun: str, label: str) -> Figure:
    figure = Figure(figsize=(8, 6))
    axes = figure.subplots()
    size = 2 if len(xy) > 20_000 else 6 if len(xy) > 2_000 else 14
    text = None if values is None else values.astype(object).where(values.notna(), None).to_numpy()
    counts = pd.Series(text, dtype=object).value_counts().head(COLOURED) if text is not None else pd.Series(dtype=int)
    other = np.ones(len(xy), bool) if text is None else ~np.isin(text.astype(str), counts.index.astype(str))
    style: dict[str, Any] = {"s": size, "linewidths": 0, "rasterized": len(xy) > 2_000}
    axes.scatter(*xy[other].T, color=GREY, **style)
    for number, name in enumerate(counts.index):
        colour, marker = OKABE_ITO[number % len(OKABE_ITO)], MARKERS[number // len(OKABE_ITO)]
        axes.scatter(*xy[text == name].T, color=colour, marker=marker, label=_plain(name), **style)
    axes.set_title(f"{len(xy):,} {noun}" + (f" by {_plain(label)}" if len(counts) else ""))
    axes.set_xlabel("UMAP 1")
    axes.set_ylabel("UMAP 2")
    axes.set_xticks([])
    axes.set_yticks([])
    if len(counts):
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2, fontsize=8, frameon=False)
    return figure


def _heat_map(scores: pd.DataFrame) -> Figure:
    shown = scores.iloc[:, :40].T
    figure = Figure(figsize=(3 + 0.5 * shown.shape[1], 1 + 0.25 * len(shown)))
    axes = figure.subplots()
    image = axes.imshow(shown.to_numpy(float), aspect="auto", cmap="viridis")
    axes.set_xticks(range(shown.shape[1]), [_plain(name) for name in shown.columns], rotation=60, ha="right")
    axes.set_yticks(range(len(shown)), [_plain(name) for name in shown.index], fontsize=8)
    figure.colorbar(image, label="mean score")
    return figure


def _plain(text: Any) -> str:
    """Return text that matplotlib does not take for a formula."""
    return str(text).replace("$", r"\$")

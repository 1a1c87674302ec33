"""The page of `monitor --report`: one HTML file that works offline, with a keyboard and with a screen reader.

Each chart is followed by a table of its numbers. Every value from a table is escaped, because clients choose the
requester, error messages and ids.
"""

import html
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import resources
from importlib.util import find_spec
from typing import Any

import pandas as pd

from scgpt_batch.errors import ConfigError, install
from scgpt_batch.io.locations import local_path
from scgpt_batch.monitoring import queries
from scgpt_batch.monitoring.rules import Alert, status
from scgpt_batch.settings import MonitorSettings

# Readable on white and on near-black, and distinct for colour-blind readers (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")

# Query -> heading, and the columns of its chart (x first), if it has one.
SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "traffic": ("Traffic by hour", ("hour", "requests", "usual", "errors")),
    "daily_performance": ("Latency by day, ms", ("day", "p50_ms", "p95_ms", "p99_ms")),
    "errors": ("Errors by status", ("status_code", "errors")),
    "versions": ("Model versions", ("served_entity", "requests")),
    "slow_requests": ("Slowest requests", ()),
    "requesters": ("Requesters", ()),
    "payloads": ("Payload sizes by day", ()),
    "recent_requests": ("Latest requests", ()),
    "last_runs": ("Batch runs", ()),
    "cells_per_second": ("Cells per second by run", ("started_at", "cells_per_second")),
    "failed_rows": ("Failed rows", ()),
    "coverage": ("Vocabulary coverage by sample", ()),
    "collapse_cells": ("Cell embedding collapse", ()),
    "collapse_genes": ("Gene embedding collapse", ()),
}
CATEGORIES = ("errors", "versions")  # drawn as bars; other charts are lines over time


def check(report: str) -> None:
    """Raise ConfigError if a page is requested and cannot be written."""
    if not report:
        return
    lacking = [name for name in ("jinja2", "plotly") if find_spec(name) is None]
    if lacking:
        raise ConfigError(f"--report needs {' and '.join(lacking)}: run {install('report')}")
    folder = local_path(report, "report").absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"cannot write --report {report}: folder {folder} does not exist; create it")


def write(
    settings: MonitorSettings, results: Mapping[str, pd.DataFrame], alerts: Sequence[Alert], at: datetime
) -> None:
    """Write the page, with a section for each query that has a result."""
    local_path(settings.report, "report").write_text(render(settings, results, alerts, at), encoding="utf-8")


def render(
    settings: MonitorSettings, results: Mapping[str, pd.DataFrame], alerts: Sequence[Alert], at: datetime
) -> str:
    """Return the page as text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    template = resources.files("scgpt_batch.monitoring").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["readable"] = readable
    return environment.from_string(template).render(
        settings=settings,
        status=status(alerts),
        alerts=alerts,
        at=at,
        health=results["endpoint_health"].iloc[0].to_dict() if "endpoint_health" in results else None,
        sections=[_section(name, results[name]) for name in SECTIONS if name in results],
        plotly=Markup(get_plotlyjs()),
    )


def readable(value: Any) -> str:
    """Return a table's value as text for people: short numbers, times in UTC, nothing for null."""
    if value is None or value is pd.NaT or (isinstance(value, float) and pd.isna(value)):
        return ""
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _section(name: str, result: pd.DataFrame) -> dict[str, Any]:
    heading, charted = SECTIONS[name]
    return {
        "id": name,
        "heading": heading,
        "question": queries.question(name),
        "columns": list(result.columns),
        "rows": result.to_numpy(dtype=object).tolist(),
        "chart": _chart(name, result[list(charted)]) if charted and len(result) else None,
        "charted": ", ".join(charted[1:]),
    }


def _chart(name: str, data: pd.DataFrame) -> Any:
    """Plot the columns over the first one; return HTML that needs plotly.js on the page."""
    import plotly.graph_objects as go
    from markupsafe import Markup

    # plotly interprets tags in labels: values that clients chose must not become links
    x = [html.escape(readable(value)) for value in data.iloc[:, 0]]
    figure = go.Figure()
    for column, colour in zip(data.columns[1:], COLOURS, strict=False):
        y = [None if pd.isna(value) else float(value) for value in data[column]]
        if name in CATEGORIES:
            figure.add_bar(x=x, y=y, name=column, marker_color=colour)
        else:
            figure.add_scatter(x=x, y=y, name=column, mode="lines+markers", line_color=colour, marker_size=4)
    figure.update_layout(
        height=320, margin={"l": 60, "r": 20, "t": 20, "b": 40}, paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)", legend={"orientation": "h"}, template="none", showlegend=True,
    )  # fmt: skip
    figure.update_xaxes(type="category" if name in CATEGORIES else "date", showgrid=False)
    figure.update_yaxes(rangemode="tozero")
    config = {"displayModeBar": False, "responsive": True}
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"chart-{name}", config=config)
    return Markup(drawn)

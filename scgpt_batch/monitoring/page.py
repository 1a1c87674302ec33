"""The page of `monitor --report`: a card for each rule, then a section for each query.

Each chart is followed by a table of its numbers. Of a chart with one point, the numbers are shown instead.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pandas as pd

from scgpt_batch.monitoring import queries
from scgpt_batch.monitoring.rules import Alert, Outcome, status
from scgpt_batch.settings import MonitorSettings
from scgpt_batch.webpage import page as webpage
from scgpt_batch.webpage.charts import bar_chart, line_chart
from scgpt_batch.webpage.page import readable

# Query -> heading, and the columns of its chart (x first), if it has one.
SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "last_runs": ("Batch runs", ()),
    "cells_per_second": ("Cells per second by run", ("started_at", "cells_per_second")),
    "failed_rows": ("Failed rows", ()),
    "coverage": ("Vocabulary coverage by sample", ()),
    "collapse_cells": ("Cell embedding collapse", ()),
    "collapse_genes": ("Gene embedding collapse", ()),
    "traffic": ("Traffic by hour", ("hour", "requests", "usual", "errors")),
    "daily_performance": ("Latency by day, ms", ("day", "p50_ms", "p95_ms", "p99_ms")),
    "errors": ("Errors by status", ("status_code", "errors")),
    "versions": ("Model versions", ("served_entity", "requests")),
    "slow_requests": ("Slowest requests", ()),
    "requesters": ("Requesters", ()),
    "payloads": ("Payload sizes by day", ()),
    "recent_requests": ("Latest requests", ()),
}
CATEGORIES = ("errors", "versions")  # drawn as bars; other charts are lines over time

BATCH_QUERIES = {"last_runs", "collapse_genes", "collapse_cells"}  # whose rules are of the batch job

VERDICTS = {"ok": "OK.", "info": "Note.", "warning": "Warning.", "critical": "Critical.", "": ""}
BOUNDS = {
    "GREATER_THAN": "Alert above {}.",
    "LESS_THAN": "Alert below {}.",
    "EQUAL": "Alert at {}.",
    "NOT_EQUAL": "Alert unless {}.",
}


def write(
    settings: MonitorSettings,
    results: Mapping[str, pd.DataFrame],
    outcomes: Sequence[Outcome],
    alerts: Sequence[Alert],
    at: datetime,
) -> None:
    """Write the page, with a section for each query that has a result."""
    webpage.write(settings.report, render(settings, results, outcomes, alerts, at))


def render(
    settings: MonitorSettings,
    results: Mapping[str, pd.DataFrame],
    outcomes: Sequence[Outcome],
    alerts: Sequence[Alert],
    at: datetime,
) -> str:
    """Return the page as text."""
    return webpage.render(
        "scgpt_batch.monitoring",
        "page.html.j2",
        settings=settings,
        status=status(alerts),
        alerts=alerts,
        at=at,
        groups=_cards(outcomes, settings),
        sections=[_section(name, results[name], settings, at) for name in SECTIONS if name in results],
    )


def _cards(outcomes: Sequence[Outcome], settings: MonitorSettings) -> list[tuple[str, list[dict[str, str]]]]:
    """Return a card for each rule, those of the batch job and those of the endpoint."""
    of_batch = [card(each, settings) for each in outcomes if set(each.rule.queries) & BATCH_QUERIES]
    of_endpoint = [card(each, settings) for each in outcomes if not set(each.rule.queries) & BATCH_QUERIES]
    window = f"Endpoint, last {settings.hours:g} h"
    return [(title, cards) for title, cards in (("Batch job", of_batch), (window, of_endpoint)) if cards]


def card(outcome: Outcome, settings: MonitorSettings) -> dict[str, str]:
    """Return the card of a rule: the value, whether it passed, and the threshold."""
    rule = outcome.rule
    state = outcome.alerts[0].severity if outcome.alerts else "ok" if outcome.is_checked else ""
    bound = BOUNDS[rule.operator].format(with_unit(rule.limit(settings), rule.unit))
    note = f"{outcome.note[:1].upper()}{outcome.note[1:]}. {bound}" if outcome.note else bound
    value = with_unit(outcome.value, rule.unit) if outcome.value is not None else "–"
    return {"label": rule.measures, "value": value, "state": state, "verdict": VERDICTS[state], "note": note}


def with_unit(value: Any, unit: str) -> str:
    """Return a value of a rule for people: fractions as percentages, times with their unit."""
    if isinstance(value, str):
        return value
    if unit == "%":
        return f"{100 * float(value):.3g}\N{NO-BREAK SPACE}%"
    if unit:
        return f"{float(value):,.0f}\N{NO-BREAK SPACE}{unit}"
    return f"{float(value):,.5g}"


def _section(name: str, result: pd.DataFrame, settings: MonitorSettings, at: datetime) -> dict[str, Any]:
    heading, charted = SECTIONS[name]
    return {
        "id": name,
        "heading": heading,
        "question": queries.question(name),
        "columns": list(result.columns),
        "rows": result.to_numpy(dtype=object).tolist(),
        "chart": _chart(name, heading, result[list(charted)]) if charted and len(result) else None,
        "note": _late_hours(settings, at) if name == "traffic" else "",
    }


def _late_hours(settings: MonitorSettings, at: datetime) -> str:
    """Say which hours of the traffic can still grow."""
    arrived = at - timedelta(minutes=settings.delay_minutes)
    return (
        f"The hours from {arrived.replace(minute=0):%H:%M} on are not complete: requests can arrive in the table "
        f"{settings.delay_minutes} minutes late. The rule checks the last full hour before."
    )


def _chart(name: str, heading: str, data: pd.DataFrame) -> dict[str, Any]:
    """Return the chart's kind and numbers: bars, lines over time, or the numbers alone where there is one time."""
    label = f"Chart: {heading}. The table below has the same numbers."
    x, columns = data.iloc[:, 0].tolist(), list(data.columns[1:])
    values = {column: [None if pd.isna(y) else float(y) for y in data[column]] for column in columns}
    if name in CATEGORIES:
        names = [readable(value) if value is not None else "not known" for value in x]
        return {"kind": "bars"} | bar_chart(f"Chart: {heading}", names, [y or 0 for y in values[columns[0]]])
    if len(set(x)) == 1:
        unit = "run" if name == "cells_per_second" else data.columns[0]
        items = [{"name": column, "text": readable(values[column][-1]) or "–"} for column in columns]
        return {"kind": "numbers", "at": f"One {unit}: {readable(x[0])}", "items": items}
    return {"kind": "lines"} | line_chart(label, [_time(value) for value in x], values)


def _time(value: date) -> datetime:
    if isinstance(value, datetime):
        return value
    return datetime(value.year, value.month, value.day, tzinfo=UTC)

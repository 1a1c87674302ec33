"""Charts as numbers for the templates of `parts.html.j2`, which draw them without scripts, in the page's colours."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from scgpt_batch.webpage.page import readable, words

SERIES = 4  # maximum number of lines in a chart; the style sheet has this many colours and dashes
HOURS = (1, 3, 6, 12, 24, 48, 168, 336, 720)  # distances between times on an axis
TIMES_ON_AXIS = 9
DENSE = 60  # points of a line from which only dots that no line joins are drawn; others would hide its dashes


def line_chart(label: str, times: Sequence[datetime], series: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """Return lines over at least two times, from 0 up; None interrupts a line."""
    first, last = min(times), max(times)
    highest = max((y for values in series.values() for y in values if y is not None), default=0.0)
    y_ticks = nice_ticks(highest)
    top = y_ticks[-1]
    x = [1000 * ((time - first) / (last - first)) for time in times]
    return {
        "label": label,
        "is_dense": len(times) > DENSE,
        "y_ticks": [{"at": round(100 * y / top, 2), "text": _short(y)} for y in y_ticks],
        "x_ticks": time_ticks(first, last),
        "series": [
            _line(number, name, x, times, [None if y is None else y / top for y in values], values)
            for number, (name, values) in enumerate(list(series.items())[:SERIES])
        ],
    }


def bar_chart(label: str, names: Sequence[str], values: Sequence[float]) -> dict[str, Any]:
    """Return horizontal bars, one for each name."""
    highest = max(values, default=0) or 1
    bars = [
        {"name": name, "width": round(100 * max(value, 0) / highest, 1), "text": readable(value)}
        for name, value in zip(names, values, strict=True)
    ]
    return {"label": label, "bars": bars}


def nice_ticks(highest: float) -> list[float]:
    """Return four to six round numbers from 0 to `highest` or a little above."""
    if highest <= 0:
        return [0.0, 1.0]
    step = 10 ** math.floor(math.log10(highest / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if highest / (step * factor) <= 5)
    return [step * i for i in range(math.ceil(highest / step - 1e-9) + 1)]


def time_ticks(first: datetime, last: datetime) -> list[dict[str, Any]]:
    """Return round times between two: hours of a day, or days. On a phone every second is left out (`minor`)."""
    span = last - first
    hours = next((h for h in HOURS if span <= timedelta(hours=h * TIMES_ON_AXIS)), HOURS[-1] * 12)
    midnight = first.replace(hour=0, minute=0, second=0, microsecond=0)
    step = timedelta(hours=hours)
    time = midnight + step * math.ceil((first - midnight) / step)
    ticks: list[dict[str, Any]] = []
    while time <= last:
        ticks.append({
            "at": round(100 * ((time - first) / span), 2),
            "text": f"{time:%H:%M}" if hours < 24 and time.hour else f"{time:%b} {time.day}",
            "minor": len(ticks) % 2 == 1,
        })  # fmt: skip
        time += step
    return ticks


def _line(
    number: int,
    name: str,
    x: Sequence[float],
    times: Sequence[datetime],
    heights: Sequence[float | None],
    values: Sequence[float | None],
) -> dict[str, Any]:
    path: list[str] = []
    dots: list[dict[str, Any]] = []
    is_drawn = False
    for at, time, height, value in zip(x, times, heights, values, strict=True):
        if height is None:
            is_drawn = False
            continue
        y = round(1000 * (1 - height), 1)
        path.append(f"{'L' if is_drawn else 'M'}{at:.1f} {y}")
        if is_drawn:
            dots[-1]["is_alone"] = False
        text = f"{time:%Y-%m-%d %H:%M}: {readable(value)}"
        dots.append({"x": round(at, 1), "y": y, "text": text, "is_alone": not is_drawn})
        is_drawn = True
    return {"number": number, "name": words(name), "path": "".join(path), "dots": dots}


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.3g}"

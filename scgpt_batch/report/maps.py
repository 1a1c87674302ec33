"""Points, colours and names of a map as JSON for the page: one byte for each point and column."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

MISSING = 255  # byte of a point without a value
MAX_CATEGORIES = 250
MAX_COLUMNS = 100
OTHER = "(other)"


@dataclass(frozen=True)
class PointMap:
    """A map of points.

    Attributes
    ----------
    noun
        What a point is: "cell", "gene".
    names
        Of the points.
    xy
        float32, (points, 2).
    drawn
        Points that the map draws, the first ones; the others appear when they are searched for.
    columns
        What points can be coloured by.
    """

    noun: str
    names: Sequence[str]
    xy: np.ndarray
    drawn: int
    columns: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the map for the page's script."""
        low, high = self.xy.min(axis=0), self.xy.max(axis=0)
        span = float(max((high - low).max(), 1e-9))
        scaled = np.round((self.xy - (low + high) / 2) / span * 65_535 + 32_767.5).astype(np.uint16)
        return {
            "noun": self.noun, "names": list(self.names), "xy": packed(scaled), "drawn": self.drawn,
            "columns": self.columns,
        }  # fmt: skip


def packed(values: np.ndarray) -> str:
    """Return numbers as base64 of their little-endian bytes."""
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()).decode()


def column(name: str, values: pd.Series, *, short: bool = False, unit: str = "") -> dict[str, Any] | None:
    """Return a column of the map; None if it has no values, or a different text for nearly every point.

    Parameters
    ----------
    short
        The map names categories by their first word.
    unit
        Of numbers, such as "score".
    """
    if pd.api.types.is_bool_dtype(values):
        values = values.map({True: "yes", False: "no"})
    if pd.api.types.is_numeric_dtype(values):
        return _numbers(name, values, unit)
    return _categories(name, values, short)


def columns(frame: pd.DataFrame) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the columns of a table of points, and the names of those that cannot colour a map."""
    made: list[dict[str, Any]] = []
    left_out: list[str] = []
    for name in frame.columns:
        found = column(str(name), frame[name]) if len(made) < MAX_COLUMNS else None
        if found is None:
            left_out.append(str(name))
        else:
            made.append(found)
    return made, left_out


def _numbers(name: str, values: pd.Series, unit: str) -> dict[str, Any] | None:
    x = values.to_numpy(dtype=np.float64, na_value=np.nan)
    known = np.isfinite(x)
    if not known.any():
        return None
    low, high = float(x[known].min()), float(x[known].max())
    bytes_ = np.full(len(x), MISSING, np.uint8)
    bytes_[known] = np.round((x[known] - low) / max(high - low, 1e-300) * (MISSING - 1))
    return {"name": name, "kind": "number", "min": low, "max": high, "unit": unit, "values": packed(bytes_)}


def _categories(name: str, values: pd.Series, short: bool) -> dict[str, Any] | None:
    text = values.astype(object).where(values.notna(), None)
    text = text.map(lambda value: None if value is None else str(value))
    counts = text.value_counts().sort_index().sort_values(ascending=False, kind="stable")
    if not len(counts) or (len(counts) > MAX_CATEGORIES and len(counts) > len(text) / 2):
        return None
    kept = list(counts.index[:MAX_CATEGORIES])
    codes = pd.Index(kept).get_indexer(text)
    if len(counts) > MAX_CATEGORIES:
        codes[(codes < 0) & text.notna().to_numpy()] = len(kept)
        kept.append(OTHER)
    codes[codes < 0] = MISSING
    sizes = np.bincount(codes[codes < MISSING], minlength=len(kept))
    return {
        "name": name, "kind": "category", "categories": kept, "counts": sizes.tolist(), "short": short,
        "values": packed(codes.astype(np.uint8)),
    }  # fmt: skip

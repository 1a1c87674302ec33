"""Damaged rows: passed to the embedder and, if a table can store them, through the job."""

import warnings
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scgpt_batch.errors import LowCoverage, PayloadError, PreprocessError
from scgpt_batch.inference.results import RowResult
from scgpt_batch.io.rows import arrow_rows, from_row, to_row
from scgpt_batch.parameters import Parameters
from tests.damaged_rows import ROW_TYPES, damaged_rows
from tests.faults.bench import (
    ADATA_ROWS,
    PARAMETERS,
    TOLERANCE,
    Bench,
    Result,
    beside,
    embedder,
    embedder_genes,
    read_columns,
)  # fmt: skip

REFUSALS = PayloadError | LowCoverage | PreprocessError  # expected errors of damaged rows
CHOICES = (
    PARAMETERS,
    PARAMETERS | {"mode": "contextual"},
    {"mode": "static", "need_preprocess": False},
    {"mode": "static", "data_is_raw": True},
)
HANGS = 30_000  # milliseconds after which a row of three cells counts as hung


def fuzzed_payloads(bench: Bench, tries: int) -> Result:
    """Each damaged row gets an expected error, or the same result as the AnnData that it can be read as."""
    result = Result("fuzzed-payloads")
    stored: list[dict[str, Any]] = []

    @given(row=damaged_rows(embedder_genes()[:4]), choice=st.sampled_from(CHOICES))
    @settings(max_examples=tries, deadline=HANGS, database=None, suppress_health_check=list(HealthCheck))
    def read_or_refused(row: dict[str, Any], choice: dict[str, Any]) -> None:
        answer = embed(row, choice)
        check(row, choice, answer)
        result.tries += 1
        stored.extend(as_stored(row))

    try:
        read_or_refused()
    except Exception as exc:
        result.broken.append("\n".join([f"{type(exc).__name__}: {exc}", *getattr(exc, "__notes__", ())]))
    through_job(bench, result, stored)
    return result


def embed(row: dict[str, Any], choice: dict[str, Any]) -> RowResult:
    (answer,) = embedder().embed_rows([row], Parameters.create(choice))
    return answer


def check(row: dict[str, Any], choice: dict[str, Any], answer: RowResult) -> None:
    """Check that a row gets an expected error with a one-line message, or the result of its AnnData."""
    if answer.error:
        assert isinstance(answer.error, REFUSALS), repr(answer.error)
        assert str(answer.error).encode()
        return
    adata = from_row(row)
    names = answer.cell_ids if choice["mode"] == "cell" else answer.genes
    assert set(names) <= set(adata.obs_names if choice["mode"] == "cell" else adata.var_names)
    assert answer.embeddings.shape == (len(names), embedder().config.embsize)
    assert np.isfinite(answer.embeddings).all()
    again = embed(to_row(adata, layout="dense"), choice)
    assert again.error is None, repr(again.error)
    assert np.abs(again.embeddings - answer.embeddings).max(initial=0) <= TOLERANCE


def as_stored(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the row as read back from a table of our types; None if no table can store it."""
    try:
        with warnings.catch_warnings(action="error"):  # complex numbers would lose their imaginary part
            return pa.RecordBatch.from_pylist([row], pa.schema(list(ROW_TYPES.items()))).to_pylist()
    except (pa.ArrowException, ValueError, TypeError, OverflowError, Warning):
        return []


def through_job(bench: Bench, result: Result, stored: list[dict[str, Any]]) -> None:
    """Run the job over the rows: the ledger must match the embedder's results, and no worker may die."""
    rows = [row | {"adata_id": f"fuzz-{i:05}"} for i, row in enumerate(stored)]
    table, out = bench.rows("fuzzed", rows), bench.folder / "fuzzed-out"
    ended = bench.warm.run(bench.embed(table, out, wave_cells=200_000, max_failed_fraction=1.0, min_coverage=0.0))
    result.broken += ended.unless(0)
    ledger = read_columns(beside(out, "_ledger"), "adata_id", "status", "error_class", "cells", "embeddings")
    lines = {line["adata_id"]: line for line in ledger.to_dict("records")}
    cells = read_columns(out, "adata_id", "cell_id")["adata_id"].value_counts()
    result.rows_in, result.rows_out = len(rows), len(cells)
    result.failed = int((ledger["status"] == "failed").sum())
    result.duplicates = len(ledger) - len(lines)
    result.seen = Counter(ledger["error_class"].fillna("answered"))
    for row in rows:
        if (line := lines.get(row["adata_id"])) is None:
            result.lost += 1
            continue
        answer = embed(next(arrow_rows(pa.RecordBatch.from_pylist([row], ADATA_ROWS))), PARAMETERS)
        wanted = type(answer.error).__name__ if answer.error else None
        n = 0 if answer.error else len(answer.cell_ids)
        if line["error_class"] != wanted or cells.get(row["adata_id"], 0) != n:
            result.broken.append(f"{row}: {line} instead of {wanted}, {n} cells")

"""The whole job, Delta to Delta: cells/s in cell and contextual mode against the model alone.

Rows of real PBMC cells, a random checkpoint of full size. The job runs twice in one session (embed_cold_warm.py); the
second run is reported. Its ceiling is the embedder on the same rows in this process, with all cores.
"""

from __future__ import annotations

import time
from pathlib import Path

from figures import PBMC, say
from job_runs import AS_COUNTED, N_GENES, checkpoint_of, embed, write_rows
from pbmc_rows import cell_rows, read_cells, to_arrow

from scgpt_batch.inference.engine import load_embedder
from scgpt_batch.parameters import Parameters

MODES = ("cell", "contextual")


def run(n_rows: int = 8, n_cells: int = 32) -> dict[str, object]:
    """Cells/s of the job in each mode that runs the model, beside the model alone."""
    rows = write_rows("job_rows", n_rows, n_cells)
    checkpoint = checkpoint_of("full", {})
    found: dict[str, object] = {"cells": n_rows * n_cells}
    for mode in MODES:
        alone = _model_alone(checkpoint, n_rows, n_cells, mode)
        result, _ = embed(checkpoint, rows, mode)
        rate = result["warm"]["cells"] / result["warm"]["seconds"]
        say(f"{mode}: the model alone {alone:.2f} cells/s, the job {rate:.2f}")
        found[mode] = {"ours": round(rate, 3), "engine": round(alone, 3), "share_of_ceiling": round(rate / alone, 3)}
    return found


def _model_alone(checkpoint: Path, n_rows: int, n_cells: int, mode: str) -> float:
    """Cells/s of the embedder in this process, on the same rows, all cores."""
    embedder = load_embedder(checkpoint)
    parameters = Parameters.create({"mode": mode, **dict(pair.split("=") for pair in AS_COUNTED)})
    made = cell_rows(read_cells(PBMC, n_genes=N_GENES), n_rows=n_rows, n_cells=n_cells)
    rows = to_arrow(list(made), "csr").to_pylist()
    next(embedder.embed_rows(rows[:1], parameters))
    started = time.perf_counter()
    for answer in embedder.embed_rows(rows, parameters):
        if answer.error:
            raise SystemExit(f"a row failed: {answer.error}")
    return n_rows * n_cells / (time.perf_counter() - started)

"""Cell embeddings: ours against upstream's `scgpt.tasks.embed_data`, on the same cells with the same weights.

Regime: real PBMC3k cells with 500 to 1,200 genes, drawn at random, raw counts, one row; a random checkpoint of the
published size. Ours is the whole of `Embedder.embed`: reading the row, binning, tokens, model. Upstream's is its loop
over batches alone, without building and loading the model, in its own environment in a process of its own, before
ours. Both have all cores; medians of three after a warm-up.

The ceiling is the rate of a square matrix product of the same type, measured before and after; the better counts.
The work is that of real tokens as ours does it (the last layer for `<cls>` alone).
"""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import torch
from figures import PBMC, WORK, matrix_rate, model_gflop, say, seconds, upstream
from full_size_checkpoint import write_checkpoint

from scgpt_batch.inference.engine import Embedder
from scgpt_batch.io.rows import to_row
from scgpt_batch.models.scgpt.checkpoint import load_checkpoint
from scgpt_batch.parameters import Parameters

N_CELLS = 16
GENES = (500, 1200)  # of a cell


def run() -> dict[str, object]:
    checkpoint, cells = make_checkpoint(), draw_cells(N_CELLS)
    theirs = measure_upstream(checkpoint, cells)
    embedder, row = Embedder(load_checkpoint(checkpoint), device="cpu"), to_row(cells)
    float32, vectors = measure_ours(embedder, row, "float32")
    bfloat16, rounded = measure_ours(embedder, row, "bfloat16")
    figures: dict[str, object] = {
        "cells": N_CELLS,
        "genes_a_cell": int(np.diff(cells.X.indptr).mean()),
        "ours": float32["cells_per_s"],
        "ours_bfloat16": bfloat16["cells_per_s"],
        "upstream": theirs["cells_per_s"],
        "ratio": round(float32["cells_per_s"] / theirs["cells_per_s"], 2),
        "ratio_bfloat16": round(bfloat16["cells_per_s"] / theirs["cells_per_s"], 2),
        "share_of_ceiling": float32["share_of_ceiling"],
        "share_of_ceiling_bfloat16": bfloat16["share_of_ceiling"],
        "cosine_min_bfloat16": round(float((vectors * rounded).sum(axis=1).min()), 6),
        # ties are drawn at random on either side, so this is near to 1, not 1
        "cosine_min_upstream": round(float((vectors * theirs["vectors"]).sum(axis=1).min()), 6),
        "profile": float32["profile"],
        "profile_bfloat16": bfloat16["profile"],
    }
    say(str(figures))
    return figures


def make_checkpoint() -> Path:
    """A random checkpoint whose vocabulary holds all gene names of the cells; reused when complete."""
    folder = WORK / "checkpoint"
    if not (folder / "args.json").exists():
        write_checkpoint(folder, genes=ad.read_h5ad(PBMC, backed="r").var_names.tolist())
    return folder


def draw_cells(n: int, *, seed: int = 0) -> ad.AnnData:
    """Draw real cells with as many genes as the regime wants."""
    cells = ad.read_h5ad(PBMC)
    genes = np.diff(cells.X.indptr)
    fit = np.flatnonzero((genes >= GENES[0]) & (genes <= GENES[1]))
    return cells[np.random.default_rng(seed).choice(fit, n, replace=False)].copy()


def measure_upstream(checkpoint: Path, cells: ad.AnnData) -> dict[str, object]:
    h5ad, vectors = WORK / "cells.h5ad", WORK / "upstream_vectors.npy"
    cells.write_h5ad(h5ad)
    figures = upstream("upstream_engine.py", checkpoint, h5ad, vectors)
    say(f"upstream: {figures['cells_per_s']:.3f} cells/s")
    return figures | {"vectors": np.load(vectors)}


def measure_ours(embedder: Embedder, row: dict[str, object], dtype: str) -> tuple[dict[str, object], np.ndarray]:
    parameters = Parameters(need_preprocess=False, data_is_raw=True, mode="cell", dtype=dtype)
    before = matrix_rate(getattr(torch, dtype))
    taken = seconds(lambda: embedder.embed(row, parameters))
    ceiling = max(before, matrix_rate(getattr(torch, dtype)))
    vectors = embedder.embed(row, parameters).cell_embeddings
    lengths = (np.diff(row["x_indptr"]) + 1).tolist()
    config = embedder.config
    work = model_gflop(lengths, d=config.embsize, d_hid=config.d_hid, layers=config.nlayers, cls_only=True)
    figures = {
        "cells_per_s": round(len(lengths) / taken, 3),
        "share_of_ceiling": round(work / taken / ceiling, 3),
        "profile": profile(embedder, parameters),
    }
    say(f"{dtype}: ceiling {ceiling:.0f} GFLOP/s, ours {work / taken:.0f}; {figures}")
    return figures, vectors


def profile(embedder: Embedder, parameters: Parameters) -> dict[str, float]:
    """Share of the model's time by kind of operation."""
    genes = np.concatenate([[embedder.vocabulary.cls_id], np.arange(850)])
    values = np.where(genes < 850, 1 + genes % 50, -2).astype(np.float32)
    packed = (torch.from_numpy(np.tile(x, 4)) for x in (genes, values))
    with torch.profiler.profile() as seen:
        embedder._model(parameters.dtype)(*packed, [len(genes)] * 4, cls_only=True)
    kinds = {"aten::addmm": "linear layers", "aten::mm": "attention", "aten::_softmax": "attention"}
    kinds["aten::_scaled_dot_product_flash_attention_for_cpu"] = "attention"
    times = {"linear layers": 0.0, "attention": 0.0, "elementwise and the rest": 0.0}
    for event in seen.key_averages():
        times[kinds.get(event.key, "elementwise and the rest")] += event.self_cpu_time_total
    return {kind: round(time / sum(times.values()), 3) for kind, time in times.items()}

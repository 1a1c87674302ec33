"""Embedding tables of separated clusters, and cells with labels and counts, for the tests of the analysis commands."""

from datetime import UTC, datetime, timedelta

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa

START = datetime(2026, 1, 1, tzinfo=UTC)
LABELS = ("B", "NK", "T")
CELLS = 90


def cluster_vectors(n=CELLS, *, d=8, seed=0):
    """Vectors of three well separated clusters, one after the other in turn."""
    rng = np.random.default_rng(seed)
    centers = 5 * np.eye(len(LABELS), d)
    return (centers[np.arange(n) % len(LABELS)] + 0.3 * rng.standard_normal((n, d))).astype(np.float32)


def names_of(n=CELLS):
    return [f"c{i}" for i in range(n)]


def embedding_lines(
    keys, vectors, *, kind="cell_id", mode="cell", version="1", hours=0, params="p", group=None, n_cells=3
):
    """Lines of an embedding table. `keys`: pairs of adata_id and cell (or gene)."""
    n = len(keys)
    columns = {
        "adata_id": [adata_id for adata_id, _ in keys], kind: [name for _, name in keys],
        "embedding": pa.array(list(vectors), pa.list_(pa.float32())),
    }  # fmt: skip
    if kind == "gene":
        columns |= {"group": pa.array([group] * n, pa.string()), "n_cells": pa.array([n_cells] * n, pa.int32())}
    stamps = {"mode": mode, "model_name": "scgpt", "model_version": version, "params_hash": params, "run_id": "r"}
    columns |= {name: [value] * n for name, value in stamps.items()}
    columns["embedded_at"] = pa.array([START + timedelta(hours=hours)] * n, pa.timestamp("us", "UTC"))
    return pa.table(columns)


def cell_lines(n=CELLS, *, adata_id="donor:0-90", **options):
    return embedding_lines([(adata_id, name) for name in names_of(n)], cluster_vectors(n), **options)


def gene_lines(n=CELLS, *, adata_id="donor:0-90", vectors=None, mode="static", **options):
    vectors = cluster_vectors(n) if vectors is None else vectors
    keys = [(adata_id, f"G{i}") for i in range(n)]
    return embedding_lines(keys, vectors, kind="gene", mode=mode, **options)


def labelled_cells(n=CELLS, n_genes=60):
    """Cells with counts; genes G0, G3, … are those of label "B", and so on."""
    rng = np.random.default_rng(1)
    labels = np.arange(n) % len(LABELS)
    mean = np.where(labels[:, None] == np.arange(n_genes)[None, :] % len(LABELS), 6.0, 0.5)
    obs = pd.DataFrame({"cell_type": np.array(LABELS, dtype=object)[labels], "batch": np.arange(n) % 2}, names_of(n))
    return ad.AnnData(
        rng.poisson(mean).astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(n_genes)])
    )


def write_labelled_cells(folder):
    """Write the labelled cells to cells.h5ad, and their obs to cells.csv."""
    cells = labelled_cells()
    cells.write_h5ad(folder / "cells.h5ad")
    cells.obs.to_csv(folder / "cells.csv")

"""Measure how much the kind of values changes cell vectors:  .venv/bin/python docs/images/values.py

PBMC3k, the checkpoint of `make demo`. Prints the table of docs/which-embedding.md: cosine of each cell's vector with
the vector of its raw counts.
"""

import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc

import scgpt_batch as sb

REPO = Path(__file__).parents[2]
COUNTS = {"data_is_raw": True, "log1p": True, "hvg_flavor": "seurat_v3"}
PLAIN = {"need_preprocess": False}


def main() -> None:
    """Print the median and the lowest cosine of each case."""
    warnings.simplefilter("ignore")
    model = sb.load_model(REPO / ".demo/checkpoint")
    counts = ad.read_h5ad(REPO / "tests/data/pbmc3k.h5ad")
    log = counts.copy()
    sc.pp.normalize_total(log, target_sum=1e4)
    sc.pp.log1p(log)
    sc.pp.highly_variable_genes(log, n_top_genes=1200)
    chosen = log[:, log.var["highly_variable"]].copy()
    cases = {
        "counts, `need_preprocess=False`": (counts, PLAIN | {"data_is_raw": True}),
        "log values, `need_preprocess=False`": (log, PLAIN),
        "log values of scanpy's 1,200 variable genes, `need_preprocess=False`": (chosen, PLAIN),
        "counts, `--preset counts`": (counts, COUNTS),
        "log values, defaults": (log, {}),
        "counts, defaults": (counts, {}),
    }
    vectors = {name: cells(adata, model, parameters) for name, (adata, parameters) in cases.items()}
    for reference in ("counts, `need_preprocess=False`", "counts, `--preset counts`"):
        print(f"\n| against {reference} | median cosine | lowest |\n|---|---|---|")
        for name, x in vectors.items():
            cosine = np.einsum("cd,cd->c", x, vectors[reference])
            print(f"| {name} | {np.nanmedian(cosine):.4f} | {np.nanmin(cosine):.4f} |")


def cells(adata: ad.AnnData, model: sb.LoadedModel, parameters: dict) -> np.ndarray:
    """Return the cell vectors."""
    copy = adata.copy()
    sb.embed(copy, model, **parameters)
    return copy.obsm["X_scGPT"]


if __name__ == "__main__":
    main()

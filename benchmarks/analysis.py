"""Label transfer at scale, gene programs at 60,000 genes, and what both find in PBMC3k.

`.venv/bin/python benchmarks/analysis.py [--only neighbours,programs,demo] [--reference N] [--queries N] [--genes N]`
"""

import argparse
import json
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

from scgpt_batch.analysis.annotate import QUERY_BLOCK, REFERENCE_BLOCK, nearest_cells, transfer_labels

D, K = 512, 10
PBMC = Path(__file__).parents[1] / "tests" / "data" / "pbmc3k.h5ad"
# Published markers of blood cells: genes of one type should share a program, genes of different types should not
MARKERS = {
    "T": ["CD3D", "CD3E", "CD3G", "IL7R", "CD2", "LCK", "IL32", "LDHB"],
    "B": ["CD79A", "CD79B", "MS4A1", "TCL1A", "LINC00926", "VPREB3", "HLA-DQA1", "BANK1"],
    "NK": ["GNLY", "NKG7", "GZMB", "PRF1", "FGFBP2", "SPON2", "CST7", "CLIC3"],
    "monocyte": ["LYZ", "S100A8", "S100A9", "CD14", "LGALS2", "FCN1", "CST3", "MS4A6A"],
    "platelet": ["PPBP", "PF4", "GNG11", "SDPR", "GP9", "SPARC", "CLU", "TUBB1"],
}


def blocks(n: int) -> Iterator[np.ndarray]:
    """Yield n reference vectors without holding them all; every block differs."""
    base = np.random.default_rng(0).standard_normal((REFERENCE_BLOCK, D)).astype(np.float32)
    for i, first in enumerate(range(0, n, REFERENCE_BLOCK)):
        yield np.roll(base, i, axis=1)[: n - first]


def neighbours(n_reference: int, n_queries: int) -> dict[str, float]:
    query = np.random.default_rng(1).standard_normal((n_queries, D)).astype(np.float32)
    block = next(blocks(REFERENCE_BLOCK))
    part = query[:QUERY_BLOCK]
    part @ block.T
    start = time.perf_counter()
    for _ in range(5):
        part @ block.T
    flops = 2 * len(part) * len(block) * D * 5 / (time.perf_counter() - start)
    start = time.perf_counter()
    nearest_cells(query, blocks(n_reference), K)
    seconds = time.perf_counter() - start
    sample, reference = query[:200], np.concatenate(list(blocks(100_000)))
    found = nearest_cells(sample, reference, K).index
    search = NearestNeighbors(n_neighbors=K, metric="cosine", algorithm="brute").fit(reference)
    exact = search.kneighbors(sample, return_distance=False)
    recall = np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, exact, strict=True)])
    return {
        "reference_cells": n_reference, "query_cells": n_queries, "seconds": round(seconds, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
        "gemm_gflops": round(flops / 1e9, 1),
        "share_of_gemm": round(2 * n_reference * n_queries * D / flops / seconds, 2), "recall": float(recall),
    }  # fmt: skip


def programs(n_genes: int) -> dict[str, float]:
    from scgpt_batch.analysis.programs import find_programs

    rng = np.random.default_rng(0)
    centers = rng.standard_normal((n_genes // 30, D))
    x = centers[rng.integers(len(centers), size=n_genes)] + rng.standard_normal((n_genes, D))
    start = time.perf_counter()
    table = find_programs(pd.DataFrame(x.astype(np.float32), index=[f"G{i}" for i in range(n_genes)]))
    return {
        "genes": n_genes, "programs": int(table["program"].nunique()), "seconds": round(time.perf_counter() - start, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
    }  # fmt: skip


def variable_genes(adata: ad.AnnData) -> list[str]:
    """Return the 2,000 most variable genes."""
    work = sc.pp.log1p(sc.pp.normalize_total(adata, target_sum=1e4, copy=True), copy=True)
    sc.pp.highly_variable_genes(work, n_top_genes=2_000)
    return work.var_names[work.var["highly_variable"]].tolist()


def demo(checkpoint: str) -> dict[str, float]:
    """Measure programs of the demo's checkpoint by known markers, and labels of one half of PBMC3k from the other."""
    import scgpt_batch as sb
    from scgpt_batch.analysis.evaluate import hvg_pca
    from scgpt_batch.analysis.programs import find_programs

    adata = ad.read_h5ad(PBMC)
    known = {gene: kind for kind, genes in MARKERS.items() for gene in genes if gene in adata.var_names}
    vectors = sb.gene_embeddings(checkpoint, sorted({*variable_genes(adata), *known}))
    random = pd.DataFrame(np.random.default_rng(0).standard_normal(vectors.shape), index=vectors.index)
    found: dict[str, float] = {}
    for name, table in (("programs", vectors), ("random", random)):
        clusters = find_programs(table, resolution=1.0, min_genes=2, n_seeds=1).set_index("gene")["program"]
        markers = [gene for gene in known if gene in clusters.index]
        found[f"ari_{name}"] = round(
            float(adjusted_rand_score([known[gene] for gene in markers], clusters[markers])), 3
        )
    adata = adata[adata.obs["cell_type"] != "unassigned"].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sb.embed(adata, checkpoint, data_is_raw=True, need_preprocess=False)
    labels = adata.obs["cell_type"].astype(str).to_numpy(dtype=object)
    half = np.random.default_rng(0).permutation(len(labels)) < len(labels) // 2
    for name, x in (("embedding", adata.obsm["X_scGPT"]), ("pca", hvg_pca(adata))):
        votes = transfer_labels(nearest_cells(x[half], x[~half], K), labels[~half])
        found[f"accuracy_{name}"] = round(float((votes["label"].to_numpy() == labels[half]).mean()), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="neighbours,programs,demo")
    parser.add_argument("--reference", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--genes", type=int, default=60_000)
    parser.add_argument("--checkpoint", default=".demo/checkpoint", help="of the part demo; `make demo` writes it")
    args = parser.parse_args()
    parts = {
        "neighbours": lambda: neighbours(args.reference, args.queries),
        "programs": lambda: programs(args.genes),
        "demo": lambda: demo(args.checkpoint),
    }
    results = {}
    for name in args.only.split(","):
        results[name] = parts[name]()
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()

"""Upstream's side of `engine.py`: time `scgpt.tasks.embed_data` in the environment of the real scgpt 0.2.4.

    .venv-upstream/bin/python benchmarks/upstream_engine.py CHECKPOINT CELLS.h5ad VECTORS.npy

What is timed is its loop over batches (loader, collator, model), not the model's building and loading. The last line
is one JSON document.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import anndata as ad
import numpy as np
import scgpt.tasks
from scgpt.tasks import cell_emb

REPEATS = 3


def main(checkpoint: str, h5ad: str, vectors: str) -> None:
    cells, taken = ad.read_h5ad(h5ad), []
    loop = cell_emb.get_batch_cell_embeddings

    def timed(adata: ad.AnnData, **options: object) -> np.ndarray:
        loop(adata[:2], **options)  # does not count
        for _ in range(REPEATS):
            started = time.perf_counter()
            result = loop(adata, **options)
            taken.append(time.perf_counter() - started)
        return result

    cell_emb.get_batch_cell_embeddings = timed
    embedded = scgpt.tasks.embed_data(cells, checkpoint, gene_col="index", device="cpu", use_fast_transformer=False)
    np.save(vectors, embedded.obsm["X_scGPT"])
    print(json.dumps({"cells_per_s": round(cells.n_obs / statistics.median(taken), 4)}))


if __name__ == "__main__":
    main(*sys.argv[1:])

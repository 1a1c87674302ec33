"""Upstream's side of `tokens.py`, in the environment of the real scgpt 0.2.4, on one core.

    .venv-upstream/bin/python benchmarks/upstream_tokens.py COUNTS.h5ad LOGS.h5ad

Loader and collator are those inside `embed_data`, run with a model that answers nothing, in this process (no worker
processes). The last line is one JSON document: cells/s of each.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import anndata as ad
import numpy as np
import torch
from scgpt.preprocess import Preprocessor
from scgpt.tasks.cell_emb import get_batch_cell_embeddings

PREPROCESSING = {
    "use_key": "X", "filter_gene_by_counts": 3, "filter_cell_by_counts": False, "normalize_total": 1e4,
    "result_normed_key": "X_normed", "log1p": False, "result_log1p_key": "X_log1p", "subset_hvg": 1200,
    "hvg_flavor": "cell_ranger", "binning": 51, "result_binned_key": "X_binned",
}  # fmt: skip


class NoModel:
    """Stands where the model is, and costs nothing."""

    def parameters(self) -> Iterator[torch.Tensor]:
        yield torch.zeros(1)

    def _encode(self, genes: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return torch.ones(len(genes), 1, 1)


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    work()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main(counts: str, logs: str) -> None:
    torch.set_num_threads(1)
    os.sched_getaffinity = lambda _: ()  # upstream starts a worker process a core; none here
    cells = ad.read_h5ad(counts)
    vocabulary = {"<pad>": cells.n_vars, "<cls>": cells.n_vars + 1}
    configs = {"pad_token": "<pad>", "pad_value": -2, "embsize": 1}
    options = {"model": NoModel(), "vocab": vocabulary, "model_configs": configs, "gene_ids": np.arange(cells.n_vars)}
    tokens = cells.n_obs / seconds(lambda: get_batch_cell_embeddings(cells, **options))
    logged = ad.read_h5ad(logs)
    preprocess = logged.n_obs / seconds(lambda: Preprocessor(**PREPROCESSING)(logged.copy(), batch_key=None))
    print(json.dumps({"tokens": tokens, "preprocess": preprocess}))


if __name__ == "__main__":
    main(*sys.argv[1:])

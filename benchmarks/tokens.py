"""From counts to tokens, on one core: ours against upstream's data loader and collator, and its Preprocessor.

Regime: 1,000 real PBMC3k cells. Binning and tokenising: of cells with 500 to 1,200 genes, as `embed_data` does it
without preprocessing. Preprocessing: filter, normalise, 1,200 variable genes, bins, with the default parameters on
log-normalised cells × the 3,000 genes that most cells carry. Medians of three after a warm-up; one thread and no
worker processes on either side. There is no ceiling but the figure to beat: 5,350 cells/s, what SLAF's documentation
says of its own loader (Apple M1 Max).
"""

from __future__ import annotations

import anndata as ad
import numpy as np
import torch
from engine import draw_cells
from figures import PBMC, WORK, say, seconds, upstream
from pbmc_rows import read_cells

from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.binning import COLLATOR_BINS, bin_matrix
from scgpt_batch.preprocessing.pipeline import binned_layer, preprocess
from scgpt_batch.preprocessing.tokens import tokenize

TO_BEAT = 5350
N_CELLS = 1000


def run() -> dict[str, object]:
    WORK.mkdir(parents=True, exist_ok=True)
    counts, logs = draw_cells(N_CELLS), read_cells(PBMC, n_genes=3000)[:N_CELLS].copy()
    counts.write_h5ad(WORK / "counts.h5ad")
    logs.write_h5ad(WORK / "logs.h5ad")
    theirs = upstream("upstream_tokens.py", WORK / "counts.h5ad", WORK / "logs.h5ad")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours = N_CELLS / seconds(lambda: tokens_of(counts))
    preprocessed = N_CELLS / seconds(lambda: bins_of(logs))
    torch.set_num_threads(threads)
    figures = {
        "ours": round(ours),
        "upstream": round(theirs["tokens"]),
        "ratio": round(ours / theirs["tokens"], 1),
        "ratio_to_slaf": round(ours / TO_BEAT, 2),
        "preprocess_ours": round(preprocessed),
        "preprocess_upstream": round(theirs["preprocess"]),
        "preprocess_ratio": round(preprocessed / theirs["preprocess"], 1),
    }
    say(str(figures))
    return figures


def tokens_of(cells: ad.AnnData) -> object:
    parameters = Parameters(need_preprocess=False, mode="cell")
    binned = bin_matrix(cells.X, cells.var_names.to_numpy(dtype=object), parameters, COLLATOR_BINS)
    return tokenize(binned, np.arange(cells.n_vars), cls_id=cells.n_vars, cls_value=-2)[0]


def bins_of(cells: ad.AnnData) -> object:
    parameters = Parameters(mode="cell")
    kept = preprocess(cells.copy(), parameters)
    names = kept.var_names.to_numpy(dtype=object)
    return bin_matrix(binned_layer(kept, parameters), names, parameters, parameters.binning)

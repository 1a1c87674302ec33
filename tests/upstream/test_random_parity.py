"""Random requests, side by side with the real scgpt 0.2.4: parameters, batches, odd data, samples, odd checkpoints.

Kept small and seeded: the same cases each run. `SCGPT_PARITY_CASES=400 make parity` runs more.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from multiprocessing import get_context
from unittest.mock import patch

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scgpt.tasks
import scipy.sparse as sp
import torch
from scgpt.model import TransformerModel
from scgpt.preprocess import Preprocessor
from scgpt.tokenizer.gene_tokenizer import GeneVocab

from scgpt_batch.errors import RowError
from scgpt_batch.inference.engine import Embedder
from scgpt_batch.inference.row_reader import RowReader
from scgpt_batch.inference.sample_rows import with_decisions
from scgpt_batch.io.rows import from_row, to_row
from scgpt_batch.models.scgpt.checkpoint import load_checkpoint
from scgpt_batch.models.scgpt.vocabulary import Vocabulary
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.binning import bin_matrix
from scgpt_batch.preprocessing.pipeline import binned_layer, preprocess
from scgpt_batch.preprocessing.tokens import ScgptTokenizer
from tests.helpers import assert_close
from tests.paths import DATA

pytestmark = pytest.mark.upstream

CASES = int(os.environ.get("SCGPT_PARITY_CASES", "60"))
UPPER, LOWER = 0.0, 1 - 1e-12


@pytest.fixture(scope="module")
def pbmc():
    return ad.read_h5ad(DATA / "pbmc3k.h5ad")


def request(pbmc: ad.AnnData, seed: int) -> tuple[ad.AnnData, dict]:
    """Draw cells, genes, batches and parameters."""
    rng = np.random.default_rng(seed)
    n, g = int(rng.choice([60, 150, 300, 600])), int(rng.choice([1500, 4000, 9000]))
    cells, genes = np.sort(rng.choice(pbmc.n_obs, n, False)), rng.permutation(pbmc.n_vars)[:g]
    counts = sp.csr_matrix(pbmc.X[cells][:, genes], dtype=np.float32)
    adata = ad.AnnData(counts, pbmc.obs.iloc[cells][[]], pbmc.var.iloc[genes][[]])
    raw = bool(rng.random() < 0.6)
    if not raw:
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
        del adata.uns["log1p"]
    if rng.random() < 0.2:
        adata.X[0].data[:] = 0  # a cell of explicit zeros
    n_batches = int(rng.integers(1, 5))
    batches = [f"b{min(int(u**2 * n_batches), n_batches - 1)}" for u in rng.random(n)]
    adata.obs["batch"] = pd.Categorical(batches)  # upstream refuses strings where each cell that is left has its own
    flavors = ["seurat_v3", "cell_ranger"] if raw else ["cell_ranger", "seurat"]
    return adata, {
        "filter_gene_by_counts": int(rng.choice([0, 3, 50])),
        "min_cell_counts": float(rng.choice([0, 50, 300])),
        "normalize_total": float(rng.choice([0, 1e3, 1e4])),
        "result_normed_key": str(rng.choice(["", "X_normed"])),
        "log1p": bool(rng.random() < 0.6),
        "result_log1p_key": str(rng.choice(["", "X_log1p"])),
        "subset_hvg": int(rng.choice([0, 50, 1200, g + 10])),
        "hvg_flavor": str(rng.choice(flavors)),
        "batch_key": str(rng.choice(["", "batch"])),
        "binning": int(rng.choice([0, 5, 51, 101])),
        "tie_break": str(rng.choice(["upper", "lower"])),
    }


def upstreams(adata: ad.AnnData, named: dict) -> ad.AnnData | None:
    """What the real Preprocessor makes of the cells; None where it fails."""
    drawn = UPPER if named["tie_break"] == "upper" else LOWER
    theirs = {k: v for k, v in named.items() if k not in ("min_cell_counts", "batch_key", "tie_break")}
    theirs |= {"use_key": "X", "filter_cell_by_counts": int(named["min_cell_counts"])}
    with patch.object(np.random, "rand", lambda *shape: np.full(shape, drawn)):
        try:
            Preprocessor(**theirs)(adata, batch_key=named["batch_key"] or None)
        except Exception:  # scanpy cannot choose variable genes
            return None
    return adata


class Upstream:
    """The real Preprocessor in a process of its own: scanpy's fit of seurat_v3's curve ends it where few genes vary."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.process = ProcessPoolExecutor(1, get_context("spawn"))

    def __call__(self, adata: ad.AnnData, named: dict) -> ad.AnnData | None:
        """Return what it makes of the cells; None where it cannot choose variable genes."""
        try:
            return self.process.submit(upstreams, adata, named).result()
        except BrokenProcessPool:
            self.start()
            return None

    def wanted(self, adata: ad.AnnData, named: dict) -> ad.AnnData | None:
        """Return what we must make of the cells; None where we must fail.

        As upstream, but for two rules: where `subset_hvg` is at least the genes that are left no choice is needed,
        and so none fails; where no cell is left there is no answer.
        """
        found = self(adata, named)
        if found is None and named["subset_hvg"]:
            found = self(adata, named | {"subset_hvg": 0})
            if found is not None and named["subset_hvg"] < found.n_vars:
                return None
        return found if found is not None and found.n_obs else None


@pytest.fixture(scope="module")
def upstream():
    started = Upstream()
    yield started
    started.process.shutdown()


@pytest.mark.parametrize("seed", range(CASES))
def test_preprocessing(pbmc, upstream, seed):
    adata, named = request(pbmc, seed)
    parameters = Parameters(**named)
    wanted = upstream.wanted(adata, named)
    if wanted is None:
        with pytest.raises(RowError):
            preprocess(from_row(to_row(adata)), parameters)
        return
    found = preprocess(from_row(to_row(adata)), parameters)
    assert found.var_names.tolist() == wanted.var_names.tolist()
    assert found.obs_names.tolist() == wanted.obs_names.tolist()
    if named["binning"]:
        names = found.var_names.to_numpy(object)
        bins = bin_matrix(binned_layer(found, parameters), names, parameters, parameters.binning)
        assert np.array_equal(bins.toarray(), wanted.layers["X_binned"])


@pytest.mark.parametrize("seed", range(CASES))
def test_samples_cut_into_rows(pbmc, upstream, seed):
    """The rows of a sample keep the genes that upstream keeps of all cells, and get the bins that they get there."""
    adata, named = request(pbmc, seed)
    adata.var_names = [f"G{i}" for i in range(adata.n_vars)]  # pbmc3k repeats none; the vocabulary knows all
    named |= {"binning": named["binning"] or 51}
    parameters = Parameters(**named, mode="cell", max_length=2 * adata.n_vars, min_coverage=0)
    wanted = upstream.wanted(adata, named)
    reader = RowReader(ScgptTokenizer(Vocabulary({name: i for i, name in enumerate(adata.var_names)})), [])
    edges = [0, *sorted(np.random.default_rng(seed).choice(np.arange(1, adata.n_obs), 2, False)), adata.n_obs]
    rows = [to_row(adata[i:j]) | {"sample_id": "s"} for i, j in pairwise(edges)]
    pairs = list(with_decisions(reader, rows, parameters))
    if wanted is None:
        for row, decisions in pairs:
            with pytest.raises(RowError):
                reader.prepare(row, parameters, decisions)
        return
    prepared = [reader.prepare(row, parameters, decisions) for row, decisions in pairs]
    assert np.concatenate([row.cell_ids for row in prepared]).tolist() == wanted.obs_names.tolist()
    assert all(row.genes.tolist() == wanted.var_names.tolist() for row in prepared)
    assert np.array_equal(sp.vstack([row.cells.binned for row in prepared]).toarray(), wanted.layers["X_binned"])


@pytest.fixture(scope="module", params=range(max(4, CASES // 10)))
def checkpoint(request, tmp_path_factory):
    """A random checkpoint: shape, vocabulary's order, key layout, number type."""
    rng, folder = np.random.default_rng(request.param), tmp_path_factory.mktemp("checkpoint")
    d, heads = [(64, 4), (48, 3), (32, 1), (40, 5), (30, 3), (16, 16), (15, 3)][rng.integers(7)]
    known = json.loads((DATA / "golden/checkpoint_flash/vocab.json").read_text())
    genes, special = [g for g in known if g[0] != "<"], ["<pad>", "<cls>", "<eoc>"]
    orders = [special + genes, genes + special, ["<mask>", *genes, *special, "zz"], genes, ["<pad>", *genes]]
    tokens = orders[rng.integers(5)]
    args = json.loads((DATA / "golden/checkpoint_flash/args.json").read_text()) | {
        "embsize": d, "nheads": heads, "d_hid": int(rng.choice([7, d, 2 * d])), "nlayers": int(rng.integers(1, 5)),
        "n_layers_cls": int(rng.integers(1, 4)), "pad_value": int(rng.choice([-2, 0, 5])),
    }  # fmt: skip
    vocabulary = GeneVocab.from_dict({token: i for i, token in enumerate(tokens)})
    for token in special:
        if token not in vocabulary:
            vocabulary.append_token(token)
    torch.manual_seed(request.param)
    model = TransformerModel(
        len(vocabulary), d, heads, args["d_hid"], args["nlayers"], args["n_layers_cls"], vocab=vocabulary,
        pad_value=args["pad_value"], do_mvc=True,
    )  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.3)
    dtype = [torch.float32, torch.float16, torch.bfloat16][rng.integers(3)]
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    if rng.random() < 0.5:
        state = {name.replace("self_attn.in_proj_", "self_attn.Wqkv."): tensor for name, tensor in state.items()}
    torch.save(state, folder / "best_model.pt")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "args.json").write_text(json.dumps(args))
    return folder


@pytest.mark.parametrize("max_length", [64, 300, 1200])
def test_cell_vectors_of_any_checkpoint(pbmc, checkpoint, monkeypatch, max_length):
    monkeypatch.setattr(np.random, "rand", lambda *shape: np.zeros(shape))
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))  # both keep the first genes
    monkeypatch.setattr(
        "scgpt_batch.preprocessing.tokens.cell_noise", lambda values, *_, **__: np.arange(len(values)) / len(values)
    )
    adata = pbmc[max_length : max_length + 12].copy()
    wanted = scgpt.tasks.embed_data(
        adata, checkpoint, gene_col="index", device="cpu", use_fast_transformer=False, max_length=max_length
    )
    parameters = Parameters(
        mode="cell", need_preprocess=False, tie_break="upper", max_length=max_length, min_coverage=0
    )
    found = Embedder(load_checkpoint(checkpoint), device="cpu").embed(to_row(adata), parameters)
    assert found.error is None
    assert_close(found.cell_embeddings, wanted.obsm["X_scGPT"], atol=1e-5)

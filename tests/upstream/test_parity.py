"""Side by side with the real scgpt 0.2.4, on cells that the golden files do not hold."""

import json

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import scgpt.tasks
import scipy.sparse as sp
import torch
from scgpt.model import TransformerModel
from scgpt.preprocess import Preprocessor, binning
from scgpt.tokenizer.gene_tokenizer import GeneVocab
from scgpt.utils import load_pretrained

from scgpt_batch.errors import RowError
from scgpt_batch.inference.engine import Embedder
from scgpt_batch.io.rows import from_row, to_row
from scgpt_batch.models.scgpt.checkpoint import load_checkpoint
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.binning import bin_range
from scgpt_batch.preprocessing.pipeline import binned_layer, preprocess
from tests.helpers import assert_close
from tests.paths import DATA

pytestmark = pytest.mark.upstream

CHECKPOINT = DATA / "golden" / "checkpoint_flash"
UPPER, LOWER = 0.0, 1 - 1e-12  # draws that take upstream to the highest and to the lowest admissible bin


@pytest.fixture(scope="module")
def pbmc():
    return ad.read_h5ad(DATA / "pbmc3k.h5ad")


@pytest.fixture(scope="module")
def embedder():
    return Embedder(load_checkpoint(CHECKPOINT), device="cpu")


@pytest.fixture(scope="module")
def theirs():
    """Upstream's model with the golden weights, as its own code builds and loads it."""
    args, vocabulary = (
        json.loads((CHECKPOINT / "args.json").read_text()),
        GeneVocab.from_file(CHECKPOINT / "vocab.json"),
    )
    model = TransformerModel(
        ntoken=len(vocabulary),
        d_model=args["embsize"],
        nhead=args["nheads"],
        d_hid=args["d_hid"],
        nlayers=args["nlayers"],
        nlayers_cls=args["n_layers_cls"],
        vocab=vocabulary,
        dropout=args["dropout"],
        pad_token=args["pad_token"],
        pad_value=args["pad_value"],
        do_mvc=True,
        use_fast_transformer=False,
    )
    load_pretrained(model, torch.load(CHECKPOINT / "best_model.pt", map_location="cpu"), verbose=False)
    return model.eval()


@pytest.fixture
def draw(monkeypatch):
    """Fix what upstream draws to settle ties."""
    return lambda value: monkeypatch.setattr(np.random, "rand", lambda *shape: np.full(shape, value))


def log1p(adata):
    adata = adata.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata


def answer(embedder, adata, **parameters):
    found = embedder.embed(to_row(adata), Parameters(**parameters))
    assert found.error is None, found.error
    return found


def test_static_vectors(embedder, theirs):
    with torch.no_grad():
        wanted = theirs.encoder(torch.arange(len(embedder.vocabulary)))
    found = embedder.whole_vocabulary(Parameters())
    assert found.genes == GeneVocab.from_file(CHECKPOINT / "vocab.json").get_itos()
    assert_close(found.gene_embeddings, wanted, atol=1e-5)


@pytest.mark.parametrize(("drawn", "tie_break"), [(UPPER, "upper"), (LOWER, "lower")])
def test_contextual_means(embedder, theirs, pbmc, draw, drawn, tie_break):
    adata = pbmc[1000:1016].copy()
    draw(drawn)
    ids = embedder.vocabulary.ids(adata.var_names)
    cls, pad, pad_value = embedder.vocabulary.cls_id, embedder.vocabulary.pad_id, embedder.config.pad_value
    genes, values = np.full((16, 2504), pad), np.full((16, 2504), pad_value, np.float32)
    for i, cell in enumerate(adata.X.toarray()[:, ids >= 0]):
        kept = np.flatnonzero(cell)
        genes[i, : len(kept) + 1] = [cls, *ids[ids >= 0][kept]]
        values[i, 1 : len(kept) + 1] = binning(cell, 51)[kept]
    genes, values = torch.from_numpy(genes), torch.from_numpy(values)
    with torch.no_grad():
        output = theirs._encode(genes, values, src_key_padding_mask=genes.eq(pad)).double().numpy()

    found = answer(embedder, adata, mode="contextual", need_preprocess=False, tie_break=tie_break)
    for gene, n_cells, vector in zip(found.genes, found.n_cells, found.gene_embeddings, strict=True):
        carries = genes.numpy() == embedder.vocabulary.ids([gene])[0]
        assert carries.sum() == n_cells
        assert_close(vector, output[carries].mean(axis=0), atol=1e-4)
    assert set(embedder.vocabulary.ids(found.genes)) == set(genes.unique().tolist()) - {cls, pad}


@pytest.mark.parametrize("prepared", [lambda adata: adata.copy(), log1p], ids=["counts", "log values"])
@pytest.mark.parametrize(("drawn", "tie_break"), [(UPPER, "upper"), (LOWER, "lower")])
def test_cell_vectors(embedder, pbmc, draw, prepared, drawn, tie_break):
    adata = prepared(pbmc[1000:1060])
    found = answer(embedder, adata, mode="cell", need_preprocess=False, tie_break=tie_break)
    draw(drawn)
    wanted = scgpt.tasks.embed_data(adata, CHECKPOINT, gene_col="index", device="cpu", use_fast_transformer=False)
    assert found.cell_ids == wanted.obs_names.tolist()
    assert_close(found.cell_embeddings, wanted.obsm["X_scGPT"], atol=1e-5)


def test_random_ties_stay_within_upstreams_noise(embedder, pbmc):
    adata = pbmc[1000:1060].copy()
    found = answer(embedder, adata, mode="cell", need_preprocess=False).cell_embeddings
    wanted = scgpt.tasks.embed_data(adata, CHECKPOINT, gene_col="index", device="cpu", use_fast_transformer=False)
    assert (found * wanted.obsm["X_scGPT"]).sum(axis=1).min() > 0.998


CASES = {
    "log values, cell_ranger": (log1p, {"log1p": False, "subset_hvg": 1200, "hvg_flavor": "cell_ranger"}),
    "counts, seurat_v3": (ad.AnnData.copy, {"log1p": True, "subset_hvg": 1200, "hvg_flavor": "seurat_v3"}),
    "counts, few cells and genes out": (
        ad.AnnData.copy,
        {"log1p": True, "subset_hvg": 0, "filter_gene_by_counts": 10, "normalize_total": 500.0},
    ),
    "not normalised": (ad.AnnData.copy, {"normalize_total": 0, "subset_hvg": 0, "binning": 21}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch_key", ["", "batch"])
def test_preprocessing_gives_upstreams_genes_and_bins(pbmc, draw, case, batch_key):
    prepared, changed = CASES[case]
    cells = prepared(pbmc[1000 : 1600 if batch_key else 1300])  # fewer, and upstream's seurat_v3 fails
    cells.obs["batch"] = np.where(np.arange(cells.n_obs) % 2, "a", "b")
    named = {"use_key": "X", "filter_gene_by_counts": 3, "normalize_total": 1e4, "binning": 51, **changed}
    bins = []
    for drawn in (LOWER, UPPER):
        wanted = cells.copy()
        draw(drawn)
        Preprocessor(**named)(wanted, batch_key=batch_key or None)
        bins.append(wanted.layers["X_binned"])

    parameters = Parameters(**named, batch_key=batch_key)
    found = preprocess(cells.copy(), parameters)
    assert found.var_names.tolist() == wanted.var_names.tolist()
    assert found.obs_names.tolist() == wanted.obs_names.tolist()
    values = binned_layer(found, parameters)
    ranges = bin_range(values.data, values.indptr, parameters.binning)[:2]
    for ours, theirs in zip(ranges, bins, strict=True):
        dense = np.zeros(values.shape, np.int64)
        dense[values.nonzero()] = ours
        assert np.array_equal(dense, theirs)


SHARED = {
    "tutorial": {},
    "not normalised": {"normalize_total": 0.0},
    "normalised values replace X": {"result_normed_key": ""},
    "not normalised, logs replace X": {"normalize_total": 0.0, "result_log1p_key": ""},
}


# upstream takes powers and logarithms of whole numbers in float64, we in float32
TOO_LARGE = [("tutorial", "seurat"), ("not normalised", "seurat")]  # e to the power of a count: infinity in float32
ROUNDED = ("not normalised, logs replace X", "cell_ranger")


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("flavor", ["seurat_v3", "cell_ranger", "seurat"])
@pytest.mark.parametrize("dtype", [np.float32, np.int32], ids=["float32", "int32"])
def test_variable_genes_look_at_what_upstream_leaves_in_x(pbmc, case, flavor, dtype):
    # with nothing between X and the logs, upstream's X and log layer are one object
    cells = ad.AnnData(sp.csr_matrix(pbmc.X[:600], dtype=dtype), pbmc.obs[:600], pbmc.var)
    named = {
        "use_key": "X", "filter_gene_by_counts": 3, "normalize_total": 1e4, "result_normed_key": "X_normed",
        "log1p": True, "result_log1p_key": "X_log1p", "subset_hvg": 1200, "hvg_flavor": flavor, "binning": 51,
    } | SHARED[case]  # fmt: skip
    wanted, error = cells.copy(), None
    whole_numbers = dtype == np.int32
    if whole_numbers and (case, flavor) == ROUNDED:
        wanted.X = wanted.X.astype(np.float32)  # the logarithms that we take
    try:
        Preprocessor(**(named | {"result_normed_key": named["result_normed_key"] or None}))(wanted)
    except Exception as exc:  # seurat on counts
        error = exc
    found = from_row(to_row(cells))
    assert found.X.dtype == dtype
    found.X = found.X.astype(np.float32)
    if error is not None or (whole_numbers and (case, flavor) in TOO_LARGE):
        with pytest.raises(RowError):
            preprocess(found, Parameters(**named), whole_numbers=whole_numbers)
        return
    found = preprocess(found, Parameters(**named), whole_numbers=whole_numbers)
    assert found.var_names.tolist() == wanted.var_names.tolist()

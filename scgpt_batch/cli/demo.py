"""What the demo needs beside the real commands: a small checkpoint made from data, and a summary to read.

The checkpoint has the published layout and is not the published weights: its gene vectors come from the co-expression
of the data at hand, its transformer layers are random.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
import scipy.sparse as sp
import torch
from sklearn.utils.extmath import randomized_svd

from scgpt_batch.command_result import CommandResult, plural
from scgpt_batch.errors import ConfigError
from scgpt_batch.models.scgpt.vocabulary import SPECIAL_TOKENS

logger = logging.getLogger(__name__)
EMBSIZE, NHEADS, NLAYERS, D_HID = 128, 4, 3, 128
N_BINS = 51
BIAS = 0.1  # standard deviation of the biases of linear layers
FACTORS = 32  # of the co-expression that are kept: cell types and their programmes, not single cells' noise
MIN_CELLS = 10  # a gene seen in fewer gets a random vector: so few cells say nothing about it
WHAT_IT_IS = (
    "Demo checkpoint of scgpt_batch: gene vectors from the co-expression of {source}, random transformer layers. "
    "NOT the published scGPT weights."
)


@dataclass(frozen=True, kw_only=True)
class DemoCheckpointResult(CommandResult):
    """The checkpoint that was written."""

    checkpoint: str
    genes: int
    genes_with_signal: int
    note: str

    def lines(self) -> list[str]:
        """Say what was written, and that it is not the published model."""
        genes = f"{plural(self.genes, 'gene')}, {self.genes_with_signal:,} with vectors from co-expression"
        return [f"checkpoint in {self.checkpoint}: {genes}", self.note]


def write_demo_checkpoint(h5ad: Path, out: Path, *, seed: int = 0) -> DemoCheckpointResult:
    """Write a small checkpoint in the published layout: best_model.pt, args.json, vocab.json.

    Raises
    ------
    ConfigError
        The file cannot be read, or `out` holds something else.
    """
    try:
        adata = ad.read_h5ad(h5ad)
    except (OSError, KeyError, ValueError) as exc:
        raise ConfigError(f"cannot read {h5ad} as .h5ad: {exc}") from exc
    note = WHAT_IT_IS.format(source=h5ad.name)
    if (out / "args.json").exists() and json.loads((out / "args.json").read_text()).get("data_source") != note:
        raise ConfigError(f"{out} holds another checkpoint: name another folder")
    logger.info("%s", note)
    tokens = [*adata.var_names, *SPECIAL_TOKENS]
    rng = np.random.default_rng(seed)
    table = 0.1 * rng.standard_normal((len(tokens), EMBSIZE)).astype(np.float32)
    known, vectors = coexpression_vectors(adata, rng)
    table[known] = vectors

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"cannot write a checkpoint to {out}: {exc.strerror}") from exc
    torch.save(_state_dict(table, seed), out / "best_model.pt")
    (out / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    args = {
        "data_source": note, "input_style": "binned", "input_emb_style": "continuous", "n_bins": N_BINS,
        "pad_token": "<pad>", "pad_value": -2, "mask_value": -1, "embsize": EMBSIZE, "nheads": NHEADS,
        "nlayers": NLAYERS, "d_hid": D_HID, "n_layers_cls": 3, "dropout": 0.2, "max_seq_len": 1200,
    }  # fmt: skip
    (out / "args.json").write_text(json.dumps(args, indent=2))
    return DemoCheckpointResult(checkpoint=str(out), genes=adata.n_vars, genes_with_signal=len(known), note=note)


def coexpression_vectors(adata: ad.AnnData, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Factor the genes' correlation over cells: genes expressed in the same cells point the same way.

    Counts are normalised, logged, centred and scaled per gene; the leading factors of genes × cells are rotated at
    random into d dimensions and scaled like a trained table (about 0.1 an entry).

    Returns
    -------
    Positions of the genes seen in enough cells, and their vectors, float32, (genes, d).
    """
    counts = ad.AnnData(sp.csr_matrix(adata.X, dtype=np.float32))
    sc.pp.normalize_total(counts, target_sum=1e4)
    sc.pp.log1p(counts)
    known = np.flatnonzero(counts.X.getnnz(axis=0) >= MIN_CELLS)
    x = counts.X[:, known].toarray()
    x -= x.mean(axis=0)
    x /= np.maximum(x.std(axis=0), 1e-6)
    n_factors = min(FACTORS, min(x.shape) - 1)
    genes, strength, _ = randomized_svd(x.T, n_factors, random_state=0)
    rotation = np.linalg.qr(rng.standard_normal((EMBSIZE, n_factors)))[0]
    vectors = (genes * strength) @ rotation.T
    vectors += 0.05 * vectors.std() * rng.standard_normal(vectors.shape)
    return known, (0.1 * vectors / np.sqrt((vectors**2).mean(axis=1, keepdims=True))).astype(np.float32)


def _state_dict(table: np.ndarray, seed: int) -> dict[str, torch.Tensor]:
    """Return tensors under the published names; LayerNorms are the identity, layers are random and small.

    Linear layers have biases: without them the value encoder is a multiple of the value, which its LayerNorm cancels.
    """
    generator = torch.Generator().manual_seed(seed)
    d = table.shape[1]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def bias(rows: int) -> torch.Tensor:
        return BIAS * torch.randn(rows, generator=generator)

    state = {"encoder.embedding.weight": torch.from_numpy(table)}
    norms = ["encoder.enc_norm", "value_encoder.norm"]
    linears = {"value_encoder.linear1": (d, 1), "value_encoder.linear2": (d, d)}
    for i in range(NLAYERS):
        layer = f"transformer_encoder.layers.{i}"
        norms += [f"{layer}.norm1", f"{layer}.norm2"]
        linears |= {
            f"{layer}.self_attn.Wqkv": (3 * d, d), f"{layer}.self_attn.out_proj": (d, d),
            f"{layer}.linear1": (D_HID, d), f"{layer}.linear2": (d, D_HID),
        }  # fmt: skip
    for name in norms:
        state |= {f"{name}.weight": torch.ones(d), f"{name}.bias": torch.zeros(d)}
    for name, (rows, columns) in linears.items():
        state |= {f"{name}.weight": matrix(rows, columns), f"{name}.bias": bias(rows)}
    # each unit of the value encoder starts at a bin of its own, so that vectors differ over the whole range of bins
    starts = N_BINS * torch.rand(d, generator=generator)
    state["value_encoder.linear1.bias"] = -starts * state["value_encoder.linear1.weight"][:, 0]
    return state

"""Cell vectors on a GPU in bfloat16: ours against the padded `nn.TransformerEncoder` that upstream runs there.

    python benchmarks/gpu.py

Needs torch and numpy alone. Regime: a random checkpoint of the published size; packed tokens lie ready on the host,
vectors go back to it. Ours runs cells of 500 to 1,200 genes over a sweep of batch sizes, and cells of 600, 1,024 (64
GFLOP each) and 1,200 genes; the other side pads batches of 64 and runs under float16 autocast, as `embed_data` does
without flash-attn. The ceiling is the rate of a large bfloat16 matrix product. Medians of three after a warm-up. The
last line is one JSON document.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass

import numpy as np
import torch
from figures import CannotRun, matrix_rate, model_gflop, say, seconds
from full_size_checkpoint import write_checkpoint
from gpu_imports import Checkpoint, ScGPT, build_model, load_checkpoint
from torch import nn

SWEEP = (16_384, 32_768, 65_536, 131_072, 262_144)  # tokens a batch


@dataclass(frozen=True)
class Sizes:
    """What is measured: the published model, or a small one that shows on a CPU that the code runs."""

    device: str = "cuda"
    n_cells: int = 2048
    mixed: tuple[int, int] = (500, 1200)
    genes: tuple[int, ...] = (600, 1024, 1200)
    sweep: tuple[int, ...] = SWEEP
    product: int = 8192
    batch: int = 64  # cells that the other side pads together
    n_genes: int = 60_694
    d: int = 512
    layers: int = 12
    heads: int = 8

    def checkpoint(self) -> Checkpoint:
        """Return a random checkpoint of this size."""
        with tempfile.TemporaryDirectory() as folder:
            return load_checkpoint(
                write_checkpoint(
                    folder, n_genes=self.n_genes, embsize=self.d, d_hid=self.d, nheads=self.heads, nlayers=self.layers
                )
            )

    def model(self) -> ScGPT:
        """Return the model of a random checkpoint, in bfloat16."""
        return build_model(self.checkpoint(), device=self.device, dtype=torch.bfloat16)


SMALL = Sizes(device="cpu", n_cells=6, mixed=(20, 50), genes=(24, 40, 48), sweep=(64, 128), product=64, batch=3,
              n_genes=100, d=64, layers=2, heads=4)  # fmt: skip


def run(sizes: Sizes = Sizes()) -> dict[str, object]:  # frozen
    if sizes.device == "cuda" and not torch.cuda.is_available():
        raise CannotRun("there is no CUDA GPU")
    ceiling = matrix_rate(torch.bfloat16, device=sizes.device, n=sizes.product) / 1e3
    name = torch.cuda.get_device_name() if sizes.device == "cuda" else sizes.device
    say(f"{name}: ceiling {ceiling:.0f} TFLOP/s in bfloat16")
    low, high = sizes.mixed
    mixed = np.sort(np.random.default_rng(0).integers(low + 1, high + 2, sizes.n_cells))
    model = sizes.model()
    figures: dict[str, object] = {"gpu": name, "attention": model.backend, "ceiling_tflops": round(ceiling)}
    regimes = {"": mixed} | {f"_{genes}_genes": np.full(sizes.n_cells, genes + 1) for genes in sizes.genes}
    for regime, lengths in regimes.items():
        gflop = model_gflop(lengths.tolist(), d=sizes.d, d_hid=sizes.d, layers=sizes.layers, cls_only=True)
        sweep = {tokens: cells_per_s(model, lengths, tokens, device=sizes.device) for tokens in sizes.sweep}
        best = max(sweep.values())
        padded = padded_cells_per_s(lengths, sizes)
        figures[f"ours{regime}"] = round(best, 1)
        figures[f"upstream{regime}"] = round(padded, 1)
        figures[f"ratio{regime}"] = round(best / padded, 2)
        figures[f"share_of_ceiling{regime}"] = round(best * gflop / sizes.n_cells / 1e3 / ceiling, 3)
        figures[f"sweep{regime}"] = {tokens: round(rate) for tokens, rate in sweep.items()}
        say(f"{regime or '_mixed'}: ours {best:.0f} cells/s, padded {padded:.0f} cells/s, {figures[f'sweep{regime}']}")
    return figures


def cells_per_s(model: ScGPT, lengths: np.ndarray, tokens: int, *, device: str) -> float:
    batches = [packed(part, len(model.encoder.embedding.weight)) for part in split(lengths, tokens)]

    def embed() -> None:
        for vectors in [model(*batch, cls_only=True) for batch in batches]:  # queued first, then fetched
            vectors.cpu()

    return len(lengths) / seconds(embed, device=device)


def split(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Cut sorted cells into batches of about so many tokens."""
    batch_of = (np.cumsum(lengths) - 1) // tokens
    return [lengths[batch_of == i] for i in np.unique(batch_of)]


def packed(lengths: np.ndarray, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Random cells on the host, as the tokeniser leaves them."""
    rng = np.random.default_rng(0)
    genes = rng.integers(0, n_tokens, lengths.sum())
    values = rng.integers(1, 51, len(genes)).astype(np.float32)
    return torch.from_numpy(genes), torch.from_numpy(values), lengths.tolist()


def padded_cells_per_s(lengths: np.ndarray, sizes: Sizes) -> float:
    """The encoder layers alone, as upstream builds them; cells in the order in which they come, so mixed in length."""
    device, batch = sizes.device, sizes.batch
    layer = nn.TransformerEncoderLayer(sizes.d, sizes.heads, sizes.d, batch_first=True)
    encoder = nn.TransformerEncoder(layer, sizes.layers, enable_nested_tensor=False).to(device).eval()
    shuffled = np.random.default_rng(1).permutation(lengths)[: 8 * batch]
    batches = []
    for first in range(0, len(shuffled), batch):
        part = torch.from_numpy(shuffled[first : first + batch])
        padding = torch.arange(int(part.max())) >= part[:, None]
        batches.append((torch.randn(*padding.shape, sizes.d, device=device), padding.to(device)))
    half = torch.float16 if device == "cuda" else torch.bfloat16  # the CPU has no autocast to float16 everywhere

    def embed() -> None:
        with torch.no_grad(), torch.autocast(device, half):
            for x, padding in batches:
                encoder(x, src_key_padding_mask=padding)[:, 0].cpu()

    return len(shuffled) / seconds(embed, device=device)


if __name__ == "__main__":
    try:
        print(json.dumps(run()))
    except CannotRun as exc:
        raise SystemExit(f"benchmarks/gpu.py: {exc}") from exc

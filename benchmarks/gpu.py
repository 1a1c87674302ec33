"""Cell vectors on a GPU in bfloat16: ours against the padded `nn.TransformerEncoder` that upstream runs there.

    python benchmarks/gpu.py

Needs torch and numpy alone. Regime: a random checkpoint of the published size; packed tokens lie ready on the host,
vectors go back to it. Ours runs cells of 500 to 1,200 genes, and cells of 1,024 genes (64 GFLOP each), over a sweep of
batch sizes; the other side pads batches of 64 and runs under float16 autocast, as `embed_data` does without
flash-attn. The ceiling is the rate of a large bfloat16 matrix product. Medians of three after a warm-up. The last
line is one JSON document.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from figures import CannotRun, matrix_rate, model_gflop, say, seconds
from full_size_checkpoint import write_checkpoint
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the package is not installed

from scgpt_batch.model import ScGPT, load_checkpoint

N_CELLS = 2048
SWEEP = (16_384, 32_768, 65_536, 131_072, 262_144)  # tokens a batch
D, LAYERS, HEADS = 512, 12, 8


def run() -> dict[str, object]:
    if not torch.cuda.is_available():
        raise CannotRun("there is no CUDA GPU")
    ceiling = matrix_rate(torch.bfloat16, device="cuda", n=8192) / 1e3
    name = torch.cuda.get_device_name()
    say(f"{name}: ceiling {ceiling:.0f} TFLOP/s in bfloat16")
    mixed = np.sort(np.random.default_rng(0).integers(501, 1202, N_CELLS))
    even = np.full(N_CELLS, 1025)
    padded = padded_cells_per_s(mixed, device="cuda")
    say(f"padded nn.TransformerEncoder, float16 autocast: {padded:.0f} cells/s")
    with tempfile.TemporaryDirectory() as folder:
        model = ScGPT.from_checkpoint(load_checkpoint(write_checkpoint(folder)), device="cuda", dtype=torch.bfloat16)
    figures: dict[str, object] = {"gpu": name, "attention": model.backend, "ceiling_tflops": round(ceiling)}
    for regime, lengths in (("", mixed), ("_1024_genes", even)):
        gflop = model_gflop(lengths.tolist(), d=D, d_hid=D, layers=LAYERS, cls_only=True)
        sweep = {tokens: cells_per_s(model, lengths, tokens, device="cuda") for tokens in SWEEP}
        best = max(sweep.values())
        figures[f"ours{regime}"] = round(best)
        figures[f"share_of_ceiling{regime}"] = round(best * gflop / N_CELLS / 1e3 / ceiling, 3)
        figures[f"sweep{regime}"] = {tokens: round(rate) for tokens, rate in sweep.items()}
    figures |= {"upstream": round(padded), "ratio": round(float(figures["ours"]) / padded, 2)}  # type: ignore[arg-type]
    say(str(figures))
    return figures


def cells_per_s(model: ScGPT, lengths: np.ndarray, tokens: int, *, device: str) -> float:
    batches = [packed(part, len(model.encoder.embedding.weight)) for part in split(lengths, tokens)]

    def embed() -> None:
        for vectors in [model(*batch, cls_only=True) for batch in batches]:  # asked for first, then fetched
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


def padded_cells_per_s(lengths: np.ndarray, *, device: str, batch: int = 64) -> float:
    """The encoder layers alone, as upstream builds them; cells in the order in which they come, so mixed in length."""
    layer = nn.TransformerEncoderLayer(D, HEADS, D, batch_first=True)
    encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).to(device).eval()
    shuffled = np.random.default_rng(1).permutation(lengths)[: 8 * batch]
    batches = []
    for first in range(0, len(shuffled), batch):
        part = torch.from_numpy(shuffled[first : first + batch])
        padding = torch.arange(int(part.max())) >= part[:, None]
        batches.append((torch.randn(*padding.shape, D, device=device), padding.to(device)))

    def embed() -> None:
        with torch.no_grad(), torch.autocast(device, torch.float16):
            for x, padding in batches:
                encoder(x, src_key_padding_mask=padding)[:, 0].cpu()

    return len(shuffled) / seconds(embed, device=device)


if __name__ == "__main__":
    try:
        print(json.dumps(run()))
    except CannotRun as exc:
        raise SystemExit(f"benchmarks/gpu.py: {exc}") from exc

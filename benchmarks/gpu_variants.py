"""The encoder with single parts replaced, to find what a card gains from each; numbers are checked by `gpu_parts.py`.

Weights are those of a loaded `ScGPT` in bfloat16; structure and order are its own.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from gpu_imports import BACKENDS, Packing, ScGPT, activate, attention, distinct, to_device
from torch.nn.attention import SDPBackend, sdpa_kernel

HALF = torch.bfloat16
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Packing], torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """What is replaced.

    Attributes
    ----------
    attention
        A backend of the package; "cudnn": cuDNN's kernel for packed sequences, through torch; "cudnn-dense": cuDNN's
        kernel over runs of cells of one length; "triton/queries/keys/warps/stages": our kernel with these blocks.
    norm
        The sum and its LayerNorm: "torch" as the package, "compiled" by torch.compile, "triton" by our kernel.
    residual
        Type of what is carried from layer to layer.
    epilogue
        Bias and ReLU within the product of the feed-forward layer.
    """

    attention: str = "varlen"
    norm: str = "torch"
    residual: torch.dtype = torch.float32
    epilogue: bool = False

    def __str__(self) -> str:
        residual = str(self.residual).removeprefix("torch.")
        return f"{self.attention}, norm {self.norm}, residual {residual}{', ReLU in the product' * self.epilogue}"


def forward(
    model: ScGPT, variant: Variant, genes: torch.Tensor, values: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """Return the vector of each cell's first token, float32, as `model(..., cls_only=True)`."""
    device = model.encoder.embedding.weight.device
    bins, bin_of = (to_device(x, device) for x in distinct(values))
    return on_device(
        model, variant, to_device(genes, device), bins, bin_of, Packing(lengths, device, variant.attention)
    )


@torch.inference_mode()
def on_device(
    model: ScGPT, variant: Variant, genes: torch.Tensor, bins: torch.Tensor, bin_of: torch.Tensor, cells: Packing
) -> torch.Tensor:
    """Run what follows the copies to the device."""
    x = (model.encoder(genes) + model.value_encoder(bins)[bin_of]).to(variant.residual)
    half = x.to(HALF)
    cells.ends  # noqa: B018  # copied to the device now, as no copy may be within a CUDA graph
    *layers, last = model.transformer_encoder["layers"]
    for layer in layers:
        x, half = _layer(layer, variant, x, half, cells)
    # the last layer for the first tokens alone, as the package
    attended = last.self_attn.first_token(half, _as_package(cells))
    return last._after_attention(x[cells.starts].float(), attended)


def _layer(
    layer: torch.nn.Module, variant: Variant, x: torch.Tensor, half: torch.Tensor, cells: Packing
) -> tuple[torch.Tensor, torch.Tensor]:
    attn, add_norm = layer.self_attn, add_norms(variant.norm)
    q, k, v = attn._project(half, slice(None)).chunk(3, dim=1)
    attended = attn.out_proj(attend(variant.attention)(q, k, v, cells).flatten(1))
    x, half = add_norm(x, attended, layer.norm1)
    if variant.epilogue:
        inside = torch.ops.aten._addmm_activation(layer.linear1.bias, half, layer.linear1.weight.t(), use_gelu=False)
    else:
        inside = F.relu_(layer.linear1(half))
    return add_norm(x, layer.linear2(inside), layer.norm2)


def _as_package(cells: Packing) -> Packing:
    """The first tokens alone attend by a backend of the package: for one query a cell, the kernel hardly matters."""
    package = copy(cells)  # with the positions that are on the device already
    package.backend = "varlen" if _is_ours(cells.backend) else cells.backend
    return package


# Attention


def _is_ours(name: str) -> bool:
    """Say whether a kernel is one of this file's, not a backend of the package."""
    return name not in BACKENDS


def attend(name: str) -> Attend:
    if name.startswith("triton/"):
        return partial(_triton_attention, blocks=tuple(map(int, name.split("/")[1:])))
    return {"cudnn": cudnn_attention, "cudnn-dense": cudnn_dense_attention}.get(name, attention)


def _triton_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cells: Packing, *, blocks: tuple[int, ...]
) -> torch.Tensor:
    from gpu_kernels import packed_attention

    queries, keys, warps, stages = blocks
    longest = max(cells.lengths)
    return packed_attention(q, k, v, cells.ends, longest, queries=queries, keys=keys, warps=warps, stages=stages)


def cudnn_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cells: Packing) -> torch.Tensor:
    longest = max(cells.lengths)
    packed = (q, k, v, None, cells.ends, cells.ends, longest, longest)
    return torch.ops.aten._cudnn_attention_forward(*packed, True, 0.0, False, False)[0]


def cudnn_dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cells: Packing) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attention(q, k, v, Packing(cells.lengths, cells.device, "sdpa"))


def use(name: str) -> None:
    """Make a kernel the process's own, where one call has several below it."""
    activate("varlen" if _is_ours(name) else name)


# Sum and LayerNorm


def add_norms(name: str) -> Callable[[torch.Tensor, torch.Tensor, torch.nn.LayerNorm], tuple[torch.Tensor, ...]]:
    return {"torch": _torch_add_norm, "compiled": _compiled_add_norm, "triton": _triton_add_norm}[name]


def _torch_add_norm(x: torch.Tensor, y: torch.Tensor, norm: torch.nn.LayerNorm) -> tuple[torch.Tensor, ...]:
    if x.dtype == HALF:  # the sum is rounded too
        out = F.layer_norm(x.add_(y), norm.normalized_shape, norm.weight.to(HALF), norm.bias.to(HALF), norm.eps)
        return out, out
    out = norm(x.add_(y))
    return out, out.to(HALF)


def _compiled_add_norm(x: torch.Tensor, y: torch.Tensor, norm: torch.nn.LayerNorm) -> tuple[torch.Tensor, ...]:
    out, half = _compiled()(x, y, norm.weight, norm.bias, norm.eps)
    return (half, half) if x.dtype == HALF else (out, half)


@cache
def _compiled() -> Callable[..., tuple[torch.Tensor, ...]]:
    def add_norm(
        x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, ...]:
        out = F.layer_norm(x.float() + y, weight.shape, weight, bias, eps)
        return (None if x.dtype == HALF else out), out.to(HALF)

    # on the CPU the graph is not compiled: there the test is of our code, not of the compiler
    return torch.compile(add_norm, dynamic=True, backend="inductor" if torch.cuda.is_available() else "eager")


def _triton_add_norm(x: torch.Tensor, y: torch.Tensor, norm: torch.nn.LayerNorm) -> tuple[torch.Tensor, ...]:
    from gpu_kernels import add_norm

    return add_norm(x, y, norm, HALF)

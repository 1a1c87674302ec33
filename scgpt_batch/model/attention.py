"""Self-attention over packed cells: each token sees the tokens of its own cell, and no padding exists.

One call, `attention`; what runs below it is chosen once a model, by `choose_backend`:

- flash: flash-attn 2's kernel for packed sequences (CUDA, compute capability 8.0, half precision)
- varlen: torch's own of the same kind (`torch.nn.attention.varlen`, torch 2.10, same needs)
- sdpa: `scaled_dot_product_attention` over runs of cells of one length (any device and type)
"""

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from itertools import groupby

import torch
import torch.nn.functional as F

from scgpt_batch.errors import ConfigError

logger = logging.getLogger(__name__)

SETTING = "SCGPT_BATCH_ATTENTION"  # an environment variable, so that it reaches every worker
BACKENDS = ("flash", "varlen", "sdpa")  # the fastest first
LONG = 192  # tokens from which bfloat16 on the CPU runs head by head


class Packing:
    """Where each cell lies among the packed tokens, and the backend that attends within it."""

    def __init__(self, lengths: Sequence[int], device: torch.device, backend: str) -> None:
        """`lengths` are the tokens of each cell, in order."""
        self.lengths = list(lengths)
        self.device = device
        self.backend = backend

    @cached_property
    def ends(self) -> torch.Tensor:
        """Where cells begin and end: 0, then the end of each, int32, (B + 1,)."""
        return send(torch.tensor([0, *self.lengths]).cumsum(0).int(), self.device)

    @property
    def starts(self) -> torch.Tensor:
        """Position of each cell's first token, `<cls>`: int32, (B,)."""
        return self.ends[:-1]


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device without waiting for what it is doing: to a GPU, from pinned memory."""
    pinned = x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
    return pinned.to(device, non_blocking=True)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cells: Packing) -> torch.Tensor:
    """Attend within each cell; softmax scale 1/sqrt(D).

    `k` and `v` are (T, H, D), the cells' tokens one after the other; `q` is the same, or holds the first token of
    each cell alone, (B, H, D). Returns the shape of `q`.
    """
    if cells.backend == "sdpa":
        return _sdpa(q, k, v, cells.lengths)
    first_alone = len(q) < len(k)
    q_ends = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) if first_alone else cells.ends
    longest = max(cells.lengths)
    packed = (q, k, v, q_ends, cells.ends, 1 if first_alone else longest, longest)
    if cells.backend == "flash":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(*packed)
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(*packed)


def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Return the fastest backend that can run, or the one that the environment variable SCGPT_BATCH_ATTENTION names.

    Raises
    ------
    ConfigError
        The one that is named cannot run here, or there is none of this name, or the GPU has no bfloat16; the message
        says why.
    """
    if device.type == "cuda" and dtype == torch.bfloat16 and _capability(device) < (8, 0):
        raise ConfigError(f"dtype bfloat16 {_too_old(device)}; ask for float32")
    wanted = os.environ.get(SETTING, "auto")
    if wanted == "auto":
        backend = next(name for name in BACKENDS if not _obstacle(name, device, dtype))
    elif wanted not in BACKENDS:
        raise ConfigError(f"{SETTING} is {wanted!r}, none of auto, {', '.join(BACKENDS)}")
    elif obstacle := _obstacle(wanted, device, dtype):
        raise ConfigError(f"{SETTING} is {wanted!r}, which {obstacle}; leave it at auto to have one chosen")
    else:
        backend = wanted
    logger.info("attention: %s (%s) for %s on %s", backend, "chosen" if wanted == "auto" else SETTING, dtype, device)
    return backend


def _obstacle(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why a backend cannot run; None when it can."""
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return f"needs a CUDA GPU, not {device}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs half precision, not {dtype}: ask for dtype bfloat16"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return (
            f"needs compute capability 8.0; {torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
        )
    module = {"flash": "flash_attn", "varlen": "torch.nn.attention.varlen"}[backend]
    if find_spec(module) is None:
        return f"needs {'flash-attn 2 installed' if backend == 'flash' else f'torch 2.10, not {torch.__version__}'}"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _too_old(device: torch.device) -> str:
    return "needs a GPU of compute capability 8.0 or more, this one has {}.{}".format(*_capability(device))


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Run neighbouring cells of one length as one batch."""
    out = torch.empty_like(q)
    start = row = 0
    for length, same in groupby(lengths):
        cells = sum(1 for _ in same)
        queries = 1 if len(q) < len(k) else length
        stop, last = start + cells * length, row + cells * queries
        # each (B, H, L, D)
        one = q[row:last].unflatten(0, (cells, queries)).transpose(1, 2)
        others = (x[start:stop].unflatten(0, (cells, length)).transpose(1, 2) for x in (k, v))
        attend = _by_head if q.device.type == "cpu" and q.dtype == torch.bfloat16 and queries >= LONG else _fused
        out[row:last] = attend(one, *others).transpose(1, 2).flatten(0, 1)
        start, row = stop, last
    return out


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _by_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend as three matrix operations a head, whose scores stay in the cache.

    torch's fused kernel works in float32 inside, at a third of the rate that AVX512 with bfloat16 gives matrices.
    """
    out = torch.empty_like(q)
    scaled = q * q.shape[-1] ** -0.5
    for at in ((cell, head) for cell in range(q.shape[0]) for head in range(q.shape[1])):
        out[at] = torch.softmax(scaled[at] @ k[at].T, dim=-1) @ v[at]
    return out

"""Self-attention over packed cells: each token sees the tokens of its own cell, and no padding exists.

One call, `attention`; what runs below it is chosen once a model, by `choose_backend`:

- flash: flash-attn 2's kernel for packed sequences (CUDA, compute capability 8.0, half precision)
- varlen: torch's own of the same kind (`torch.nn.attention.varlen`, torch 2.10, same needs)
- fa3, fa4: FlashAttention 3 or 4 below the same call (torch 2.11 and the implementation's package; Hopper or newer)
- sdpa: `scaled_dot_product_attention` over runs of cells of one length (any device and type)
"""

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from itertools import groupby

import torch
import torch.nn.attention
import torch.nn.functional as F

from scgpt_batch.errors import ConfigError

logger = logging.getLogger(__name__)

SETTING = "SCGPT_BATCH_ATTENTION"  # an environment variable, so that it reaches every worker
BACKENDS = ("flash", "varlen", "fa3", "fa4", "sdpa")
# Which of them is chosen: the first that can run, by the card's major compute capability. Only measured orders stand
# here; until fa3 and fa4 are measured on a card of capability 9, only SCGPT_BATCH_ATTENTION selects them.
ORDER: dict[int, tuple[str, ...]] = {}
DEFAULT_ORDER = ("flash", "varlen", "sdpa")
# What torch.nn.attention can put below `varlen_attn`: its name there, the module that holds it, and the least card
IMPLEMENTATIONS = {"fa3": ("FA3", "flash_attn_interface", (9, 0)), "fa4": ("FA4", "flash_attn.cute", (9, 0))}
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
        return to_device(torch.tensor([0, *self.lengths]).cumsum(0).int(), self.device)

    @property
    def starts(self) -> torch.Tensor:
        """Position of each cell's first token, `<cls>`: int32, (B,)."""
        return self.ends[:-1]


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
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
        order = ORDER.get(_capability(device)[0], DEFAULT_ORDER) if device.type == "cuda" else DEFAULT_ORDER
        backend = next(name for name in order if not obstacle(name, device, dtype))
    elif wanted not in BACKENDS:
        raise ConfigError(f"{SETTING} is {wanted!r}, none of auto, {', '.join(BACKENDS)}")
    elif why := obstacle(wanted, device, dtype):
        raise ConfigError(f"{SETTING} is {wanted!r}, which {why}; leave it at auto to have one chosen")
    else:
        backend = wanted
    activate(backend)
    logger.info("attention: %s (%s) for %s on %s", backend, "chosen" if wanted == "auto" else SETTING, dtype, device)
    for name in IMPLEMENTATIONS if wanted == "auto" else ():
        if name != backend and not obstacle(name, device, dtype):
            logger.info("attention: %s can run here too; %s=%s selects it", name, SETTING, name)
    return backend


def activate(backend: str) -> None:
    """Put the implementation that a backend needs below torch's `varlen_attn`, for the whole process."""
    if backend in IMPLEMENTATIONS:
        torch.nn.attention.activate_flash_attention_impl(IMPLEMENTATIONS[backend][0])
    elif backend == "varlen" and getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)():
        torch.nn.attention.restore_flash_attention_impl()


def obstacle(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why a backend cannot run; None when it can."""
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return f"needs a CUDA GPU, not {device}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs half precision, not {dtype}: ask for dtype bfloat16"
    _, module, least = IMPLEMENTATIONS.get(backend, ("", "", (8, 0)))
    capability = _capability(device)
    if capability < least:
        return "needs compute capability {}.{}; {} has {}.{}".format(
            *least, torch.cuda.get_device_name(device), *capability
        )
    if backend == "flash":
        return None if _is_installed("flash_attn.flash_attn_interface") else "needs flash-attn 2 installed"
    if not _is_installed("torch.nn.attention.varlen"):
        return f"needs torch 2.10, not {torch.__version__}"
    if backend == "varlen":
        return None
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return f"needs torch 2.11, not {torch.__version__}"
    return None if _is_installed(module) else f"needs the module {module}, which is not installed"


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nor is its parent
        return False


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

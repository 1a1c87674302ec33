"""Self-attention over packed cells, without padding: each token attends to the tokens of its own cell.

`attention` is the only function that the models call. `choose_backend` selects its implementation once for each model:

- flash: the kernel of flash-attn 2 for packed sequences (CUDA, compute capability 8.0, half precision)
- varlen: torch's own kernel for packed sequences (`torch.nn.attention.varlen`, torch 2.10, same requirements)
- fa3, fa4: FlashAttention 3 or 4, called through torch (torch 2.11, the package of the kernel, Hopper or newer)
- sdpa: `scaled_dot_product_attention` over consecutive cells of equal length (any device and type)
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

from scgpt_batch.errors import ConfigError, listed

logger = logging.getLogger(__name__)

SETTING = "SCGPT_BATCH_ATTENTION"  # an environment variable, so that it reaches every worker
BACKENDS = ("flash", "varlen", "fa3", "fa4", "sdpa")
# Order of preference by the major compute capability of the GPU; the first backend that can run is used. Only measured
# orders are listed. fa3 and fa4 have not been measured on capability 9, so only SCGPT_BATCH_ATTENTION selects them.
ORDER: dict[int, tuple[str, ...]] = {}
DEFAULT_ORDER = ("flash", "varlen", "sdpa")
# Kernels that torch can use for `varlen_attn`: name in torch, module, and lowest compute capability
IMPLEMENTATIONS = {"fa3": ("FA3", "flash_attn_interface", (9, 0)), "fa4": ("FA4", "flash_attn.cute", (9, 0))}
LONG = 192  # number of tokens from which bfloat16 on the CPU is computed head by head


class Packing:
    """The boundaries of the cells in packed tokens, and the attention backend.

    Attributes
    ----------
    lengths
        Number of tokens of each cell, in order.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, backend: str) -> None:
        self.lengths = list(lengths)
        self.device = device
        self.backend = backend

    @cached_property
    def ends(self) -> torch.Tensor:
        """Boundaries of the cells: 0, then the end of each cell; int32, shape (B + 1,)."""
        return to_device(torch.tensor([0, *self.lengths]).cumsum(0).int(), self.device)

    @property
    def starts(self) -> torch.Tensor:
        """Position of the first token of each cell, `<cls>`: int32, shape (B,)."""
        return self.ends[:-1]


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on the device. The copy to a GPU uses pinned memory, so it does not wait for running kernels."""
    pinned = x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
    return pinned.to(device, non_blocking=True)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cells: Packing) -> torch.Tensor:
    """Return softmax(q kᵀ / sqrt(D)) v within each cell, in the shape of `q`.

    Parameters
    ----------
    q
        Queries, (T, H, D); or only those of the first token of each cell, (B, H, D).
    k, v
        Keys and values of all tokens, (T, H, D).
    cells
        Boundaries of the cells.
    """
    if cells.backend == "sdpa":
        return _sdpa(q, k, v, cells.lengths)
    first_only = len(q) < len(k)
    q_ends = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) if first_only else cells.ends
    longest = max(cells.lengths)
    packed = (q, k, v, q_ends, cells.ends, 1 if first_only else longest, longest)
    if cells.backend == "flash":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(*packed)
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(*packed)


def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Return the fastest backend that can run, or the one set by the environment variable SCGPT_BATCH_ATTENTION.

    Raises
    ------
    ConfigError
        SCGPT_BATCH_ATTENTION names a backend that is unknown or cannot run here, or the GPU does not support bfloat16.
    """
    if device.type == "cuda" and dtype == torch.bfloat16 and _capability(device) < (8, 0):
        raise ConfigError(f"dtype bfloat16 {_too_old(device)}; use dtype float32")
    wanted = os.environ.get(SETTING, "auto")
    if wanted == "auto":
        order = ORDER.get(_capability(device)[0], DEFAULT_ORDER) if device.type == "cuda" else DEFAULT_ORDER
        backend = next(name for name in order if not obstacle(name, device, dtype))
    elif wanted not in BACKENDS:
        raise ConfigError(f"{SETTING} is {wanted!r}, but must be one of {listed(('auto', *BACKENDS), wanted)}")
    elif why := obstacle(wanted, device, dtype):
        raise ConfigError(f"{SETTING} is {wanted!r}, which {why}; set it to auto to choose a backend that can run")
    else:
        backend = wanted
    activate(backend)
    logger.info("attention: %s (%s) for %s on %s", backend, "chosen" if wanted == "auto" else SETTING, dtype, device)
    for name in IMPLEMENTATIONS if wanted == "auto" else ():
        if name != backend and not obstacle(name, device, dtype):
            logger.info("attention: %s is available too; select it with %s=%s", name, SETTING, name)
    return backend


def activate(backend: str) -> None:
    """Set the kernel of torch's `varlen_attn` that a backend needs, for the whole process."""
    if backend in IMPLEMENTATIONS:
        torch.nn.attention.activate_flash_attention_impl(IMPLEMENTATIONS[backend][0])
    elif backend == "varlen" and getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)():
        torch.nn.attention.restore_flash_attention_impl()


def obstacle(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why a backend cannot run, or None if it can."""
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return f"needs a CUDA GPU, not {device}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs half precision, not {dtype}: use dtype bfloat16"
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
    except ModuleNotFoundError:  # the parent package is not installed
        return False


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _too_old(device: torch.device) -> str:
    return "needs a GPU of compute capability 8.0 or higher, but this one has {}.{}".format(*_capability(device))


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Compute attention for each run of consecutive cells of equal length as one batch."""
    out = torch.empty_like(q)
    start = row = 0
    for length, same in groupby(lengths):
        cells = sum(1 for _ in same)
        queries = 1 if len(q) < len(k) else length
        stop, last = start + cells * length, row + cells * queries
        # each (B, H, L, D)
        batch_q = q[row:last].unflatten(0, (cells, queries)).transpose(1, 2)
        batch_kv = (x[start:stop].unflatten(0, (cells, length)).transpose(1, 2) for x in (k, v))
        attend = _by_head if q.device.type == "cpu" and q.dtype == torch.bfloat16 and queries >= LONG else _fused
        out[row:last] = attend(batch_q, *batch_kv).transpose(1, 2).flatten(0, 1)
        start, row = stop, last
    return out


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _by_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute attention head by head, as two matrix products whose scores stay in the CPU cache.

    torch's fused kernel computes in float32 internally, three times slower than matrix products in bfloat16 with
    AVX512.
    """
    out = torch.empty_like(q)
    scaled = q * q.shape[-1] ** -0.5
    for at in ((cell, head) for cell in range(q.shape[0]) for head in range(q.shape[1])):
        out[at] = torch.softmax(scaled[at] @ k[at].T, dim=-1) @ v[at]
    return out

"""Triton kernels of the GPU benchmarks: a sum and its LayerNorm in one pass over memory; attention over packed cells.

With `TRITON_INTERPRET=1` they run on the CPU, where the tests compare them with torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def add_norm_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, out_ptr, half_ptr, n_rows, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    at = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    real = (rows < n_rows)[:, None]
    x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
    x += tl.load(y_ptr + at, mask=real, other=0.0).to(tl.float32)
    x -= (tl.sum(x, axis=1) / WIDTH)[:, None]
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
    weight = tl.load(weight_ptr + columns).to(tl.float32)
    bias = tl.load(bias_ptr + columns).to(tl.float32)
    x = x * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=real)
    if HALF:
        tl.store(half_ptr + at, x.to(half_ptr.dtype.element_ty), mask=real)


def add_norm(
    x: torch.Tensor, y: torch.Tensor, norm: torch.nn.LayerNorm, half: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return LayerNorm(x + y), in the type of `x` and in the type `half` for the next product; x and y are (T, d).

    The sum and the statistics are float32. Where both types are one, both results are one tensor.
    """
    n_rows, width = x.shape
    if width & (width - 1):
        raise ValueError(f"the width must be a power of two, not {width}")
    out = torch.empty_like(x)
    second = out if half == x.dtype else torch.empty_like(x, dtype=half)
    rows = max(1, 2048 // width)
    add_norm_kernel[(triton.cdiv(n_rows, rows),)](
        x.contiguous(), y.contiguous(), norm.weight, norm.bias, out, second, n_rows, norm.eps,
        WIDTH=width, ROWS=rows, HALF=second is not out, num_warps=4,
    )  # fmt: skip
    return out, second


@triton.jit
def _attend_to(q, k_at, v_at, there, top, total, mixed, scale, MASKED: tl.constexpr):
    """Add one block of keys and values to what a block of queries has seen (online softmax in base 2)."""
    if MASKED:
        k = tl.load(k_at, mask=there[:, None], other=0.0)
        v = tl.load(v_at, mask=there[:, None], other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    scores = tl.dot(q, tl.trans(k))
    if MASKED:
        scores = tl.where(there[None, :], scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - highest[:, None])
    shrink = tl.exp2(top - highest)
    mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None])
    return highest, total * shrink + tl.sum(weights, 1), mixed


@triton.jit
def packed_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, ends_ptr, scale, stride, out_stride,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    first, head, cell = tl.program_id(0) * QUERIES, tl.program_id(1), tl.program_id(2)
    start = tl.load(ends_ptr + cell)
    length = tl.load(ends_ptr + cell + 1) - start
    if first < length:
        rows, columns = first + tl.arange(0, QUERIES), tl.arange(0, WIDTH)
        here = (rows < length)[:, None]
        offset = start.to(tl.int64) * stride + head * WIDTH
        q = tl.load(q_ptr + offset + rows[:, None] * stride + columns[None, :], mask=here, other=0.0)
        k_ptr += offset
        v_ptr += offset
        top = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
        whole = length // KEYS * KEYS
        for at in range(0, whole, KEYS):
            keys = at + tl.arange(0, KEYS)
            places = keys[:, None] * stride + columns[None, :]
            top, total, mixed = _attend_to(
                q, k_ptr + places, v_ptr + places, keys < length, top, total, mixed, scale, MASKED=False
            )
        for at in range(whole, length, TAIL):  # what is left of the last block, in small ones
            keys = at + tl.arange(0, TAIL)
            places = keys[:, None] * stride + columns[None, :]
            top, total, mixed = _attend_to(
                q, k_ptr + places, v_ptr + places, keys < length, top, total, mixed, scale, MASKED=True
            )
        mixed = mixed / total[:, None]
        places = (start + rows).to(tl.int64)[:, None] * out_stride + head * WIDTH + columns[None, :]
        tl.store(out_ptr + places, mixed.to(out_ptr.dtype.element_ty), mask=here)


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int,
    *, queries: int = 128, keys: int = 64, warps: int = 4, stages: int = 3,
) -> torch.Tensor:  # fmt: skip
    """Attend within each cell: q, k and v are (T, H, D) parts of one projection; `ends` are 0 and each cell's end.

    `queries` and `keys` are the sides of a block of scores; `warps` work on it, `stages` of loads are in flight.
    """
    _, heads, width = q.shape
    if not (q.stride() == k.stride() == v.stride() and q.stride()[1:] == (width, 1)):
        raise ValueError("q, k and v must be parts of one projection")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grid = (triton.cdiv(longest, queries), heads, len(ends) - 1)
    packed_attention_kernel[grid](
        q, k, v, out, ends, width**-0.5 * 1.4426950408889634, q.stride(0), out.stride(0),
        WIDTH=width, QUERIES=queries, KEYS=keys, TAIL=16, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out

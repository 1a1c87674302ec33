"""A Triton kernel of the GPU benchmarks: the sum of two tensors and its LayerNorm in one pass over memory.

With `TRITON_INTERPRET=1` it runs on the CPU, where the tests compare it with torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _add_norm(
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
    _add_norm[(triton.cdiv(n_rows, rows),)](
        x.contiguous(), y.contiguous(), norm.weight, norm.bias, out, second, n_rows, norm.eps,
        WIDTH=width, ROWS=rows, HALF=second is not out, num_warps=4,
    )  # fmt: skip
    return out, second

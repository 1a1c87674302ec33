"""Self-attention over packed cells: each token sees the tokens of its own cell, and no padding exists."""

from itertools import groupby

import torch
import torch.nn.functional as F


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Attend within each cell; softmax scale 1/sqrt(D).

    `q`, `k`, `v` are (T, H, D): the cells' tokens one after the other, `lengths` tokens each. Neighbouring cells of
    one length run as one batch, so callers sort cells by length. Returns (T, H, D).
    """
    out = torch.empty_like(q)
    start = 0
    for length, same in groupby(lengths):
        cells = sum(1 for _ in same)
        stop = start + cells * length
        # each (B, H, L, D)
        qkv = (x[start:stop].unflatten(0, (cells, length)).transpose(1, 2) for x in (q, k, v))
        out[start:stop] = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(0, 1)
        start = stop
    return out

"""The scGPT encoder in plain torch, for inference: genes and binned values in, embeddings out.

Numbers are those of upstream's `TransformerModel._encode` in evaluation mode: post-norm layers, ReLU, no positions.
Cells are packed: B cells of different lengths lie one after the other in T tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from scgpt_batch.models.attention import Packing, attention, to_device
from scgpt_batch.models.scgpt.config import ModelConfig

MAX_VALUE = 512  # upstream's ContinuousValueEncoder clamps there; it has no lower bound


class Linear(nn.Linear):
    """A linear layer that works in the type of its weights, whatever arrives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class GeneEncoder(nn.Module):
    """Token id -> embedding row, normalised."""

    def __init__(self, n_tokens: int, width: int) -> None:
        super().__init__()
        # not nn.Embedding(n, d): drawing its weights imports two seconds of torch's decompositions on the meta device
        self.embedding = nn.Embedding.from_pretrained(torch.empty(n_tokens, width))
        self.enc_norm = nn.LayerNorm(width)

    def forward(self, genes: torch.Tensor) -> torch.Tensor:
        return self.enc_norm(self.embedding(genes))  # (T,) -> (T, d)


class ValueEncoder(nn.Module):
    """Binned expression value -> vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, width)
        self.linear2 = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        x = values.clamp(max=MAX_VALUE).unsqueeze(-1)  # (n,) -> (n, 1)
        return self.norm(self.linear2(F.relu(self.linear1(x))))


class SelfAttention(nn.Module):
    """Multi-head self-attention within each cell; tensor names as in torch's MultiheadAttention."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = Linear(width, width)

    def forward(self, x: torch.Tensor, cells: Packing) -> torch.Tensor:
        q, k, v = self._project(x, slice(None)).chunk(3, dim=1)  # each (T, H, D)
        return self.out_proj(attention(q, k, v, cells).flatten(1))

    def first_token(self, x: torch.Tensor, cells: Packing) -> torch.Tensor:
        """Attend from the first token of each cell alone: (T, d) -> (B, d)."""
        d = x.shape[1]
        q = self._project(x[cells.starts], slice(d))
        k, v = self._project(x, slice(d, None)).chunk(2, dim=1)
        return self.out_proj(attention(q, k, v, cells).flatten(1))

    def _project(self, x: torch.Tensor, part: slice) -> torch.Tensor:
        x = F.linear(x.to(self.in_proj_weight.dtype), self.in_proj_weight[part], self.in_proj_bias[part])
        return x.unflatten(1, (-1, self.out_proj.in_features // self.n_heads))  # (T, heads of all parts, D)


class Layer(nn.Module):
    """One post-norm transformer layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config.embsize, config.nheads)
        self.linear1 = Linear(config.embsize, config.d_hid)
        self.linear2 = Linear(config.d_hid, config.embsize)
        self.norm1 = nn.LayerNorm(config.embsize)
        self.norm2 = nn.LayerNorm(config.embsize)

    def forward(self, x: torch.Tensor, cells: Packing) -> torch.Tensor:
        return self._after_attention(x, self.self_attn(x, cells))

    def first_token(self, x: torch.Tensor, cells: Packing) -> torch.Tensor:
        """Give the output of each cell's first token alone: (T, d) -> (B, d)."""
        return self._after_attention(x[cells.starts], self.self_attn.first_token(x, cells))

    def _after_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        # sums and norms stay in float32 while the matrices may work in bfloat16; sums take the place of `x`, which
        # nobody needs any more, because fresh memory costs more than the sum
        x = self.norm1(x.add_(attended))
        return self.norm2(x.add_(self.linear2(self.linear1(x).relu_())))


class ScGPT(nn.Module):
    """The encoder of scGPT.

    `forward` takes packed cells; `gene_vectors` is the table of static gene embeddings.
    """

    def __init__(self, config: ModelConfig, n_tokens: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = GeneEncoder(n_tokens, config.embsize)
        self.value_encoder = ValueEncoder(config.embsize)
        self.transformer_encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(Layer(config) for _ in range(config.nlayers))}
        )
        self.backend = "sdpa"

    @torch.inference_mode()
    def gene_vectors(self, genes: torch.Tensor) -> torch.Tensor:
        """Return the static embedding of each token id: its row of the table after the LayerNorm, (n, d)."""
        return self.encoder(genes)

    @torch.inference_mode()
    def forward(
        self, genes: torch.Tensor, values: torch.Tensor, lengths: Sequence[int], *, cls_only: bool = False
    ) -> torch.Tensor:
        """Encode packed cells.

        Parameters
        ----------
        genes
            Token ids, int64, (T,); each cell starts with `<cls>`. Like `values` best on the CPU.
        values
            Binned expression, float32, (T,).
        lengths
            Tokens of each cell, in order; their sum is T. Sorted lengths run fastest.
        cls_only
            Give the output of each cell's first token alone, which saves most of the last layer.

        Returns
        -------
        The transformer's output, float32, for each token, (T, d), or with `cls_only` for each cell, (B, d).
        """
        device = self.encoder.embedding.weight.device
        cells = Packing(lengths, device, self.backend)
        # each value is encoded once; they are found on the CPU, so that nothing waits on the device
        bins, bin_of = (to_device(x, device) for x in distinct(values))
        x = self.encoder(to_device(genes, device)).add_(self.value_encoder(bins)[bin_of])
        *layers, last = self.transformer_encoder["layers"]
        for layer in layers:
            x = layer(x, cells)
        return last.first_token(x, cells) if cls_only else last(x, cells)


def distinct(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values that include all of `values`, and the position of each among them.

    Bins are whole numbers in a small range, which needs no sort: sorting 65,536 of them takes as long as a GPU needs
    for the whole model.
    """
    whole = values.int()
    if not len(values) or not torch.equal(whole.to(values.dtype), values):
        return torch.unique(values, return_inverse=True)
    low, high = (int(x) for x in whole.aminmax())
    if high - low > MAX_VALUE:
        return torch.unique(values, return_inverse=True)
    return torch.arange(low, high + 1, dtype=values.dtype, device=values.device), (whole - low).long()

"""The scGPT encoder in plain torch, for inference: from genes and binned values to embeddings.

Numerically equivalent to upstream's `TransformerModel._encode` in evaluation mode: post-norm layers, ReLU, no position
encoding. Cells are packed: the T tokens of B cells of different lengths are concatenated, without padding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from scgpt_batch.models.attention import Packing, attention, to_device
from scgpt_batch.models.scgpt.config import ModelConfig

MAX_VALUE = 512  # upper limit of a value in upstream's ContinuousValueEncoder, which has no lower limit


class Linear(nn.Linear):
    """A linear layer that converts its input to the type of its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class GeneEncoder(nn.Module):
    """Embedding of token ids, with LayerNorm."""

    def __init__(self, n_tokens: int, width: int) -> None:
        super().__init__()
        # nn.Embedding(n, d) would initialise the weights; on the meta device that imports torch modules for 2 s
        self.embedding = nn.Embedding.from_pretrained(torch.empty(n_tokens, width))
        self.enc_norm = nn.LayerNorm(width)

    def forward(self, genes: torch.Tensor) -> torch.Tensor:
        return self.enc_norm(self.embedding(genes))  # (T,) -> (T, d)


class ValueEncoder(nn.Module):
    """Embedding of binned expression values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, width)
        self.linear2 = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        x = values.clamp(max=MAX_VALUE).unsqueeze(-1)  # (n,) -> (n, 1)
        return self.norm(self.linear2(F.relu(self.linear1(x))))


class SelfAttention(nn.Module):
    """Multi-head self-attention within each cell. Tensors are named as in torch's MultiheadAttention."""

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
        """Return the attention output of only the first token of each cell: (T, d) -> (B, d)."""
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
        """Return the output of only the first token of each cell: (T, d) -> (B, d)."""
        return self._after_attention(x[cells.starts], self.self_attn.first_token(x, cells))

    def _after_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        # Sums and norms are float32, even if the matrix products use bfloat16. The sums overwrite `x`, because
        # allocating memory takes longer than adding.
        x = self.norm1(x.add_(attended))
        return self.norm2(x.add_(self.linear2(self.linear1(x).relu_())))


class ScGPT(nn.Module):
    """The encoder of scGPT: `forward` returns contextual vectors, `gene_vectors` static gene embeddings."""

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
        """Return the static embedding of each token id, after the LayerNorm: (n,) -> (n, d)."""
        return self.encoder(genes)

    @torch.inference_mode()
    def forward(
        self, genes: torch.Tensor, values: torch.Tensor, lengths: Sequence[int], *, cls_only: bool = False
    ) -> torch.Tensor:
        """Return the transformer's output for packed cells.

        Parameters
        ----------
        genes
            Token ids, int64, (T,); each cell starts with `<cls>`. Preferably on the CPU, like `values`.
        values
            Binned expression, float32, (T,).
        lengths
            Number of tokens of each cell, in order; their sum is T. Sorted lengths are fastest.
        cls_only
            Return the output of only the first token of each cell, which saves most of the last layer.

        Returns
        -------
        The output for each token, float32, (T, d), or with `cls_only` for each cell, (B, d).
        """
        device = self.encoder.embedding.weight.device
        cells = Packing(lengths, device, self.backend)
        # each distinct value is encoded once; they are found on the CPU, so that nothing waits on the device
        bins, bin_of = (to_device(x, device) for x in distinct(values))
        x = self.encoder(to_device(genes, device)).add_(self.value_encoder(bins)[bin_of])
        *layers, last = self.transformer_encoder["layers"]
        for layer in layers:
            x = layer(x, cells)
        return last.first_token(x, cells) if cls_only else last(x, cells)


def distinct(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sorted values that include all of `values`, and the position of each of `values` among them.

    For whole numbers in a small range, as bins are, this avoids a sort. Sorting 65,536 values takes as long as the
    whole model on a GPU.
    """
    whole = values.int()
    if not len(values) or not torch.equal(whole.to(values.dtype), values):
        return torch.unique(values, return_inverse=True)
    low, high = (int(x) for x in whole.aminmax())
    if high - low > MAX_VALUE:
        return torch.unique(values, return_inverse=True)
    return torch.arange(low, high + 1, dtype=values.dtype, device=values.device), (whole - low).long()

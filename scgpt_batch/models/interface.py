"""What the inference engine needs of a model family: a row's cells as tokens, and vectors for tokens.

scGPT's are `preprocessing.tokens.ScgptTokenizer` with its `BinnedCells`, and `models.scgpt.ScGPT`. Another family
brings its own in the same places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class Tokens:
    """Cells as token sequences, packed one after the other; each starts with `<cls>`.

    Attributes
    ----------
    genes
        Token ids, int64, (T,).
    values
        What the model gets beside each token (scGPT: binned expression), float32, (T,).
    lengths
        Tokens of each cell, int64, (B,).
    """

    genes: np.ndarray
    values: np.ndarray
    lengths: np.ndarray

    def halves(self) -> "tuple[Tokens, Tokens]":
        """Split after half of the cells."""
        cells = len(self.lengths) // 2
        at = int(self.lengths[:cells].sum())
        return (
            Tokens(self.genes[:at], self.values[:at], self.lengths[:cells]),
            Tokens(self.genes[at:], self.values[at:], self.lengths[cells:]),
        )


class CellTokens(Protocol):
    """The cells of one row, ready to become tokens."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each cell, special tokens included: int64, (cells,)."""

    @property
    def expressed(self) -> np.ndarray:
        """Mask of the row's genes that at least one cell has a token of: (genes,)."""

    def tokens(self, cells: np.ndarray) -> tuple[Tokens, np.ndarray]:
        """Return the tokens of some cells, in the order of `cells` (positions in the row).

        Returns
        -------
        The tokens, and the position of each one's gene in the row, int64, (T,); -1 for special tokens.
        """


class Encoder(Protocol):
    """A model with its weights on a device."""

    def gene_vectors(self, genes: torch.Tensor) -> torch.Tensor:
        """Return the static vector of each token id: (n,) -> (n, d)."""

    def __call__(
        self, genes: torch.Tensor, values: torch.Tensor, lengths: Sequence[int], *, cls_only: bool = False
    ) -> torch.Tensor:
        """Encode packed cells: a vector for each token, (T, d), or with `cls_only` for each cell, (B, d)."""

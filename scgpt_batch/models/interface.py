"""The interface between the inference engine and a model family: cells become tokens, tokens become vectors.

For scGPT it is implemented by `preprocessing.tokens.ScgptTokenizer`, its `BinnedCells`, and `models.scgpt.ScGPT`.
Another family implements the same interface in the same places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class Tokens:
    """The concatenated token sequences of several cells; each sequence starts with `<cls>`.

    Attributes
    ----------
    genes
        Token ids, int64, shape (T,).
    values
        Value of each token (scGPT: binned expression), float32, shape (T,).
    lengths
        Number of tokens of each cell, int64, shape (B,).
    """

    genes: np.ndarray
    values: np.ndarray
    lengths: np.ndarray

    def halves(self) -> "tuple[Tokens, Tokens]":
        """Return the tokens of the first half of the cells, and of the second."""
        cells = len(self.lengths) // 2
        at = int(self.lengths[:cells].sum())
        return (
            Tokens(self.genes[:at], self.values[:at], self.lengths[:cells]),
            Tokens(self.genes[at:], self.values[at:], self.lengths[cells:]),
        )


class CellTokens(Protocol):
    """The preprocessed cells of one row."""

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each cell, including special tokens: int64, shape (cells,)."""

    @property
    def expressed(self) -> np.ndarray:
        """Whether any cell has a token of each gene: bool, shape (genes,)."""

    def tokens(self, cells: np.ndarray) -> tuple[Tokens, np.ndarray]:
        """Return the tokens of some cells.

        Parameters
        ----------
        cells
            Positions of the cells in the row, in the order of the result.

        Returns
        -------
        The tokens, and for each token the position of its gene in the row, int64, shape (T,); -1 for special tokens.
        """


class Encoder(Protocol):
    """A model whose weights are on a device."""

    def gene_vectors(self, genes: torch.Tensor) -> torch.Tensor:
        """Return the static embedding of each token id: (n,) -> (n, d)."""

    def __call__(
        self, genes: torch.Tensor, values: torch.Tensor, lengths: Sequence[int], *, cls_only: bool = False
    ) -> torch.Tensor:
        """Return a vector for each token of packed cells, (T, d), or with `cls_only` for each cell, (B, d)."""

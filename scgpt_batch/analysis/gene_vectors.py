"""Vectors of genes, of each group of cells."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class GeneVectors:
    """Vectors of genes, of one model.

    Attributes
    ----------
    source
        The table as it was named.
    model
        The columns mode, model_name, model_version and params_hash.
    groups
        Genes × d, sorted by gene, by group of cells; static vectors, and contextual ones without groups, have the key
        None.

    Examples
    --------
    >>> static = pd.DataFrame([[1.0, 0.0], [0.0, 1.0]], index=["CD3D", "MS4A1"])
    >>> vectors = GeneVectors("genes", {"mode": "static"}, {None: static})
    >>> vectors.count, vectors.dimension
    (2, 2)
    """

    source: str
    model: Mapping[str, str]
    groups: Mapping[str | None, pd.DataFrame]

    @property
    def genes(self) -> set[str]:
        """The genes of all groups."""
        return set().union(*(of_group.index for of_group in self.groups.values()))

    @property
    def count(self) -> int:
        """The number of genes."""
        return len(self.genes)

    @property
    def dimension(self) -> int:
        """The length of a vector."""
        return next(iter(self.groups.values())).shape[1]

"""How the contextual vectors of genes differ between groups of cells."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

BLOCK = 8_192


@dataclass(frozen=True)
class Movement:
    """Vectors of genes in groups, against the gene's mean over groups.

    Attributes
    ----------
    genes, groups
        Names, in the order of `cosine`.
    cosine
        float32, (genes, groups): between the gene's vector in the group and its mean over its groups; NaN where the
        group has no vector of the gene.
    table
        The genes with at least two groups, those that differ most first: gene, groups, least_cosine (of two of its
        groups), and these two as group and other_group.
    """

    genes: pd.Index
    groups: list[str]
    cosine: np.ndarray
    table: pd.DataFrame


def mean_vectors(groups: Mapping[str | None, pd.DataFrame]) -> pd.DataFrame:
    """Return each gene's mean vector over the groups that have it, genes × d, sorted by gene."""
    if len(groups) == 1:
        return next(iter(groups.values()))
    genes = _all_genes(groups)
    d = next(iter(groups.values())).shape[1]
    sums, count = np.zeros((len(genes), d), np.float32), np.zeros((len(genes), 1), np.float32)
    for of_group in groups.values():
        place = genes.get_indexer(of_group.index)
        sums[place] += of_group.to_numpy(np.float32)
        count[place] += 1
    return pd.DataFrame(sums / count, index=genes)


def movement(groups: Mapping[str | None, pd.DataFrame]) -> Movement | None:
    """Compare a gene's vectors between groups; None if there are fewer than two."""
    names = [name for name in groups if name is not None]
    if len(names) < 2:
        return None
    means = mean_vectors({name: groups[name] for name in names})
    genes = means.index
    cosine = np.full((len(genes), len(names)), np.nan, np.float32)
    least = np.full(len(genes), np.inf, np.float32)
    pair = np.zeros((len(genes), 2), np.int32)
    places = [genes.get_indexer(groups[name].index) for name in names]
    # genes in blocks, with all their groups: memory stays bounded
    for start in range(0, len(genes), BLOCK):
        stop = min(start + BLOCK, len(genes))
        laid = np.full((len(names), stop - start, means.shape[1]), np.nan, np.float32)
        for number, (name, place) in enumerate(zip(names, places, strict=True)):
            here = np.flatnonzero((place >= start) & (place < stop))
            laid[number, place[here] - start] = _unit(groups[name].to_numpy(np.float32)[here])
        centre = _unit(means.to_numpy(np.float32)[start:stop])
        cosine[start:stop] = np.einsum("gnd,nd->ng", laid, centre)
        between = np.einsum("gnd,hnd->ngh", laid, laid).reshape(stop - start, -1)
        between[np.isnan(between)] = np.inf
        worst = between.argmin(axis=1)
        least[start:stop] = between[np.arange(len(worst)), worst]
        pair[start:stop] = np.column_stack(np.divmod(worst, len(names)))
    count = (~np.isnan(cosine)).sum(axis=1)
    labels = np.array(names, dtype=object)
    table = pd.DataFrame({
        "gene": genes, "groups": count, "least_cosine": least.astype(float), "group": labels[pair[:, 0]],
        "other_group": labels[pair[:, 1]],
    })[count > 1]  # fmt: skip
    table = table.sort_values(["least_cosine", "gene"], kind="stable").reset_index(drop=True)
    return Movement(genes, list(labels), cosine, table)


def _all_genes(groups: Mapping[str | None, pd.DataFrame]) -> pd.Index:
    return pd.Index(sorted(set().union(*(of_group.index for of_group in groups.values()))), dtype=object)


def _unit(x: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norms > 0, norms, 1)

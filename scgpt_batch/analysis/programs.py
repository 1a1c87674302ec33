"""Gene programs: clusters of gene vectors, how stable they are, and their scores in cells.

The steps are those of scGPT 0.2.4 (`scgpt.tasks.GeneEmbedding`): neighbours, Leiden, clusters of five genes or more,
`scanpy.tl.score_genes` scaled to [0, 1]. Stability over seeds is ours.
"""

from collections.abc import Mapping, Sequence

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc

from scgpt_batch.analysis.clusters import leiden_runs, neighbor_graph
from scgpt_batch.errors import ConfigError

RESOLUTION = 20.0  # the default of upstream's GeneEmbedding.get_adata; its tutorial takes 40
MIN_GENES = 5
NAMED_GENES = 3  # in a program's name


def find_programs(
    vectors: pd.DataFrame,
    *,
    resolution: float = RESOLUTION,
    n_neighbors: int = 15,
    min_genes: int = MIN_GENES,
    seed: int = 0,
    n_seeds: int = 10,
) -> pd.DataFrame:
    """Cluster gene vectors into programs.

    Parameters
    ----------
    vectors
        Genes × d, indexed by gene, such as `sb.gene_embeddings(model, genes)`.
    resolution
        Of the Leiden clusters: larger values give more and smaller programs.
    n_neighbors
        Of each gene in the graph.
    min_genes
        Smaller clusters are no programs.
    seed, n_seeds
        The programs are those of `seed`; stability is measured against `n_seeds` - 1 further seeds.

    Returns
    -------
    DataFrame
        One row per program and gene: program (its number by size, and its first genes), gene, rank (from 1, by cosine
        to the program's mean vector) and stability: how often the program's pairs of genes stay together under other
        seeds, 0 to 1, the same for all genes of the program.

    Raises
    ------
    ConfigError
        There are fewer than `min_genes` + 1 genes, a gene is repeated, or a vector is not finite.

    Examples
    --------
    >>> programs = find_programs(sb.gene_embeddings("scGPT_human").iloc[:200], resolution=2)
    >>> programs.columns.tolist()
    ['program', 'gene', 'rank', 'stability']
    """
    x = vectors.to_numpy(dtype=np.float32)
    if len(x) <= min_genes:
        raise ConfigError(f"{len(x)} genes are too few for programs of {min_genes} genes")
    if not vectors.index.is_unique:
        repeated = vectors.index[vectors.index.duplicated()][0]
        raise ConfigError(f"gene {repeated!r} has several vectors: give one vector per gene")
    if not np.isfinite(x).all():
        bad = vectors.index[int(np.argmin(np.isfinite(x).all(axis=1)))]
        raise ConfigError(f"the vector of gene {bad!r} contains NaN or infinity")
    graph = neighbor_graph(x, n_neighbors=n_neighbors, seed=seed)
    partitions = leiden_runs(graph, [(resolution, seed + i) for i in range(n_seeds)])
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    tables = []
    for cluster, size in enumerate(np.bincount(partitions[0])):  # clusters are numbered by size
        if size < min_genes:
            break
        members = np.flatnonzero(partitions[0] == cluster)
        center = unit[members].mean(axis=0)
        members = members[np.argsort(-(unit[members] @ center), kind="stable")]
        genes = vectors.index[members].to_numpy(dtype=object)
        table = pd.DataFrame({"gene": genes, "rank": np.arange(1, size + 1)})
        table.insert(0, "program", f"P{cluster + 1} {' '.join(genes[:NAMED_GENES])}")
        table["stability"] = stability(members, partitions[1:])
        tables.append(table)
    if not tables:
        return pd.DataFrame(columns=["program", "gene", "rank", "stability"])
    return pd.concat(tables, ignore_index=True)


def stability(members: np.ndarray, partitions: Sequence[np.ndarray]) -> float:
    """Return the share of pairs of `members` that other partitions keep together; 1.0 without other partitions."""
    pairs = len(members) * (len(members) - 1) / 2
    if not partitions or not pairs:
        return 1.0
    together = [np.bincount(partition[members]) for partition in partitions]
    return float(np.mean([(counts * (counts - 1) / 2).sum() / pairs for counts in together]))


def score_programs(
    adata: ad.AnnData, programs: pd.DataFrame | Mapping[str, Sequence[str]], *, seed: int = 0
) -> pd.DataFrame:
    """Score programs in cells: the mean of a program's genes minus that of control genes, scaled to [0, 1] over cells.

    Parameters
    ----------
    adata
        Cells × genes, logarithms in X. Control genes are drawn from its genes: 50 per bin of 25 (scanpy's defaults).
    programs
        The table of `find_programs`, or genes by program.

    Returns
    -------
    DataFrame
        Cells × programs, 0 to 1. A program none of whose genes are in `adata` scores 0.

    Examples
    --------
    >>> score_programs(adata, {"T cells": ["CD3D", "CD3E", "CD3G"]}).columns.tolist()
    ['T cells']
    """
    if isinstance(programs, pd.DataFrame):
        programs = {name: table["gene"].tolist() for name, table in programs.groupby("program", sort=False)}
    work = ad.AnnData(adata.X, obs=pd.DataFrame(index=adata.obs_names), var=pd.DataFrame(index=adata.var_names))
    scores = {}
    for name, genes in programs.items():
        present = [gene for gene in genes if gene in work.var_names]
        if not present:
            scores[name] = np.zeros(adata.n_obs)
            continue
        sc.tl.score_genes(work, present, score_name="score", random_state=seed, use_raw=False)
        score = work.obs["score"].to_numpy()
        span = np.ptp(score)
        scores[name] = (score - score.min()) / span if span > 0 else np.zeros(len(score))
    return pd.DataFrame(scores, index=adata.obs_names)

"""One vector per gene from a table of gene embeddings, of static vectors or of each group of contextual ones."""

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scgpt_batch.analysis.gene_vectors import GeneVectors
from scgpt_batch.cli.analysis_tables import AnalysisTables, one_mode
from scgpt_batch.embedding_tables import Embeddings, sorted_by_gene, vectors_by_gene
from scgpt_batch.errors import ConfigError


def gene_vectors(tables: AnalysisTables, table: str, *, mode: str = "", model_version: str = "") -> GeneVectors:
    """Read the vectors of the model that wrote last.

    Static vectors are equal in all rows, so one line of each gene is read. Contextual vectors of several samples are
    averaged by their numbers of cells, which gives the mean over all cells of a group.

    Raises
    ------
    ConfigError
        The table has cell embeddings, or vectors of both modes and `mode` is not given.
    """
    if "gene" not in tables.columns(table):
        raise ConfigError(f"{table} is not a table of gene embeddings: embed with --mode static or contextual")
    choice = {"mode": mode, "model_version": model_version}
    if not mode:
        choice["mode"] = one_mode(tables.values(table, "mode"), table)
    if choice["mode"] == "contextual":
        found = tables.embeddings(table, **choice)
        return GeneVectors(table, found.model, _means(found))
    lines = tables.static_lines(table, model_version)
    return GeneVectors(table, lines.model, {None: vectors_by_gene(lines)})


def _means(found: Embeddings) -> dict[str | None, pd.DataFrame]:
    """Return each group's mean vectors over samples, weighted by the cells that express the gene."""
    frame, vectors = found.frame(), found.vectors
    weights = frame["n_cells"].fillna(1).to_numpy(np.float64)
    labels = frame["group"].fillna("").astype(str)
    means: dict[str | None, pd.DataFrame] = {}
    for group in sorted(set(labels)):
        of_group = np.flatnonzero(labels == group)
        codes, genes = pd.factorize(frame["gene"].to_numpy(dtype=object)[of_group])
        place = sp.csr_matrix((weights[of_group], (codes, np.arange(len(codes)))))
        sums = place @ vectors[of_group].astype(np.float64)
        means[group or None] = sorted_by_gene((sums / np.asarray(place.sum(axis=1))).astype(np.float32), genes)
    return means

"""One vector per gene from a table of gene embeddings, of static vectors or of each group of contextual ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scgpt_batch.cli.analysis_tables import AnalysisTables, one_mode
from scgpt_batch.embedding_tables import Embeddings, table_path
from scgpt_batch.errors import ConfigError


@dataclass(frozen=True)
class GeneVectors:
    """Vectors of genes.

    Attributes
    ----------
    model
        The columns `MODEL`.
    groups
        Genes × d, sorted by gene, by group of cells; static vectors, and contextual ones without groups, have the key
        None.
    """

    model: Mapping[str, str]
    groups: Mapping[str | None, pd.DataFrame]


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
        return GeneVectors(found.model, _means(found))
    if table_path(table) is None:
        found = tables.static_embeddings(table, model_version)
        return GeneVectors(found.model, {None: _frame(found.vectors, found.frame()["gene"])})
    lines = tables.lines(table, **choice)
    one = lines.take(np.flatnonzero(~lines.frame()["gene"].duplicated().to_numpy()))
    return GeneVectors(one.model, {None: _frame(np.concatenate(list(one.blocks())), one.frame()["gene"])})


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
        means[group or None] = _frame((sums / np.asarray(place.sum(axis=1))).astype(np.float32), genes)
    return means


def _frame(vectors: np.ndarray, genes: Sequence[str]) -> pd.DataFrame:
    """Return genes × d, sorted by gene, so that the result does not depend on the order of lines in the table."""
    return pd.DataFrame(vectors, index=pd.Index(genes, dtype=object, name=None)).sort_index()

"""Preprocessing decisions for samples of several rows, computed from statistics of each row.

    decisions = None
    for _ in range(passes(parameters)):
        parts = [contribution(adata, parameters, decisions, …) for adata in rows]     # distributed, in any order
        decisions = decide(merge(parts), parameters, decisions)                       # once for each sample

The decisions equal those of scanpy on the concatenated AnnData (`anndata.concat(rows, join="outer")`): which genes pass
the gene filter, and which are variable among the cells that pass the cell filter. Sums are exact, so the division into
rows and their order do not change the result. The size of the statistics is genes × batches, independent of the number
of cells.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Self

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scgpt_batch.errors import PreprocessError, RowError, row_errors
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.hvg import (
    Moments,
    by_dispersion,
    by_dispersion_in_batches,
    by_normalized_variance,
    fit_batch,
    normalized_variance,
)
from scgpt_batch.preprocessing.pipeline import (
    HVG_ERRORS,
    batch_labels,
    check_columns,
    min_counts,
    preprocess,
    quiet_libraries,
    selection_error,
    with_requested_genes,
)
from scgpt_batch.preprocessing.sample_selection import BatchFit, Decisions, read_columns, write_columns

ALL = ""  # label of the single batch without batch_key
_EXPONENTS = 54  # shift that leaves the sign and the upper 9 bits of the exponent of a float64

Key = tuple[str, str, int]  # batch, name of the summed quantity, size class of the summands (see `exact_sums`)


def passes(parameters: Parameters) -> int:
    """Return the number of passes over the rows of a sample, 1 to 3."""
    p = parameters
    if not p.need_preprocess:
        return 1
    if not (p.subset_hvg or min_counts(p)):
        return 1
    return 3 if p.subset_hvg and _fits_curve(p) else 2


@dataclass(frozen=True)
class Statistics:
    """Sums by gene and batch over one row or several rows, for one pass.

    Attributes
    ----------
    genes
        Names of the genes, (genes,): in the order of the rows if it is the same in all, else sorted, as in
        `anndata.concat`.
    cells
        Number of cells of each batch.
    sums
        Sums for each batch, quantity and size class of the summands, float64, (genes,); see `exact_sums`.
    left_out
        Number of rows that could not be read.
    """

    genes: np.ndarray = field(default_factory=lambda: np.zeros(0, object))
    cells: Mapping[str, int] = field(default_factory=dict)
    sums: Mapping[Key, np.ndarray] = field(default_factory=dict)
    left_out: int = 0

    def merged(self, other: "Statistics") -> "Statistics":
        """Return the sum with the statistics of other rows. Commutative and associative."""
        left_out = self.left_out + other.left_out
        if not len(self.genes) or not len(other.genes):
            return replace(self if len(self.genes) else other, left_out=left_out)
        if np.array_equal(self.genes, other.genes):
            a, b = self, other
        else:
            genes = pd.Index(self.genes).union(pd.Index(other.genes))
            a, b = self._on(genes), other._on(genes)
        cells = {batch: a.cells.get(batch, 0) + b.cells.get(batch, 0) for batch in [*a.cells, *b.cells]}
        sums = dict(a.sums)
        for key, values in b.sums.items():
            sums[key] = sums[key] + values if key in sums else values
        return Statistics(a.genes, cells, sums, left_out)

    def total(self, moment: str, *batches: str) -> np.ndarray:
        """Return the sums of a quantity over these batches (default: all), float64, (genes,)."""
        by_size: dict[int, np.ndarray] = {}
        for (batch, what, size), values in self.sums.items():
            if what == moment and (not batches or batch in batches):
                by_size[size] = by_size.get(size, 0.0) + values
        return sum((by_size[size] for size in sorted(by_size)), np.zeros(len(self.genes)))

    def to_bytes(self) -> bytes:
        """Return the statistics as an Arrow stream."""
        keys = list(self.sums)
        columns = {"gene": self.genes} | {str(i): self.sums[key] for i, key in enumerate(keys)}
        return write_columns(columns, {"keys": keys, "cells": list(self.cells.items()), "left_out": self.left_out})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return the statistics that `to_bytes` wrote."""
        columns, notes = read_columns(data)
        sums = {(batch, what, size): columns[str(i)] for i, (batch, what, size) in enumerate(notes["keys"])}
        return cls(columns["gene"], dict(notes["cells"]), sums, notes["left_out"])

    def _on(self, genes: pd.Index) -> "Statistics":
        at = genes.get_indexer(pd.Index(self.genes))
        sums = {}
        for key, values in self.sums.items():
            sums[key] = np.zeros(len(genes))
            sums[key][at] = values
        return replace(self, genes=genes.to_numpy(dtype=object), sums=sums)


def contribution(
    adata: ad.AnnData, parameters: Parameters, decisions: Decisions | None, *, whole_numbers: bool
) -> Statistics:
    """Return the statistics of one row for the next pass.

    Parameters
    ----------
    adata
        The row's cells × genes with matched gene names, before preprocessing. Modified.
    parameters
        The parameters.
    decisions
        Decisions after the previous passes; None in the first pass.
    whole_numbers
        See `preprocess`.

    Raises
    ------
    RowError
        The row cannot be preprocessed.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # `decide` reports values that are too large
        check_columns(adata, parameters)
        if decisions is None:
            sums = _sums(adata.X, adata.X.data, ALL, "x")
            return Statistics(adata.var_names.to_numpy(dtype=object), {ALL: adata.n_obs}, sums)
        adata = preprocess(adata, parameters, genes_only=True, decisions=decisions, whole_numbers=whole_numbers)
        return _after_cell_filter(adata, parameters, decisions)


def merge(parts: Iterable[Statistics]) -> Statistics:
    """Return the sum of the statistics of several rows."""
    return reduce(Statistics.merged, parts, Statistics())


def decide(statistics: Statistics, parameters: Parameters, decisions: Decisions | None = None) -> Decisions:
    """Return the decisions after a pass over all rows of a sample.

    Parameters
    ----------
    statistics
        Merged statistics of all rows.
    parameters
        The parameters.
    decisions
        Decisions after the previous passes; None after the first pass.

    Returns
    -------
    Decisions, `final` after the last pass. If the sample cannot be preprocessed, `error` says why.
    """
    if decisions is not None and decisions.final:
        return decisions
    if decisions is not None and statistics.left_out > decisions.left_out:  # more rows failed in a later pass
        decisions = replace(decisions, left_out=statistics.left_out)
    try:
        if not len(statistics.genes):
            raise PreprocessError("no row of the sample can be read; see the errors of its rows")
        if decisions is None:
            return _kept_genes(statistics, parameters)
        decide_next = _by_curve if decisions.fits else _from_kept_cells
        with row_errors():  # an error of scanpy affects only this sample
            return decide_next(statistics, parameters, decisions)
    except RowError as exc:
        return Decisions.failed(str(exc))


def exact_sums(columns: np.ndarray, values: np.ndarray, n_columns: int) -> dict[int, np.ndarray]:
    """Return exact sums of values by column, separately for each size class of the values.

    Values are split into parts of 24 bits, and the parts are grouped by exponent in steps of 4 (size classes). A
    float64 has 53 bits, so sums of up to 33 million parts of one size class are exact in any order of addition.

    Parameters
    ----------
    columns, values
        Column and value of each summand: float32, or float64 with 48 significant bits (the square of a float32).
    n_columns
        Number of columns.

    Returns
    -------
    The sums of each size class that occurs, float64, (n_columns,).
    """
    upper = values.astype(np.float32).astype(np.float64)
    sums: dict[int, np.ndarray] = {}
    for part in (upper, values - upper):
        is_nonzero = part != 0
        summands, places = part[is_nonzero], columns[is_nonzero]
        size = (summands.view(np.int64) >> _EXPONENTS) & 0x1FF
        used = np.flatnonzero(np.bincount(size, minlength=512))
        rank = np.zeros(512, np.int64)
        rank[used] = np.arange(len(used))
        added = np.bincount(rank[size] * n_columns + places, summands, len(used) * n_columns)
        for s, of_size in zip(used.tolist(), added.reshape(len(used), n_columns), strict=True):
            sums[s] = sums[s] + of_size if s in sums else of_size
    return sums


def _after_cell_filter(adata: ad.AnnData, p: Parameters, decisions: Decisions) -> Statistics:
    labels = batch_labels(adata, p)
    cells: dict[str, int] = {}
    sums: dict[Key, np.ndarray] = {}
    for batch in pd.unique(labels):
        x = sp.csr_matrix(adata.X[np.flatnonzero(labels == batch)])
        cells[batch] = x.shape[0]
        sums |= _clipped(x, batch, decisions.fits) if decisions.fits else _moments(x, batch, p)
    return Statistics(decisions.genes, cells, sums)


def _sums(x: sp.csr_matrix, values: np.ndarray, batch: str, moment: str) -> dict[Key, np.ndarray]:
    return {(batch, moment, size): s for size, s in exact_sums(x.indices, values, x.shape[1]).items()}


def _moments(x: sp.csr_matrix, batch: str, p: Parameters) -> dict[Key, np.ndarray]:
    """Return sums of X, and of the values and squares that scanpy's flavors use; squares have the type of X."""
    sums = _sums(x, x.data, batch, "x")
    if not p.subset_hvg:
        return sums
    values = x.data
    if p.hvg_flavor == "seurat":
        values = np.expm1(x.data)
        sums |= _sums(x, values, batch, "expm1")
    return sums | _sums(x, np.square(values), batch, "square")


def _clipped(x: sp.csr_matrix, batch: str, fits: Mapping[str, BatchFit]) -> dict[Key, np.ndarray]:
    """Return sums of the values within the bounds, and the number of values beyond, which are clipped later."""
    if batch not in fits:
        return {}
    values = x.data.astype(np.float64)
    beyond = values > fits[batch].bounds[x.indices]
    within = np.where(beyond, 0.0, values)
    sums = _sums(x, within, batch, "within") | _sums(x, np.square(within), batch, "within squared")
    return sums | _sums(x, beyond.astype(np.float64), batch, "beyond")


def _kept_genes(statistics: Statistics, p: Parameters) -> Decisions:
    totals = statistics.total("x", ALL)
    kept = np.ones(len(totals), bool)
    if p.need_preprocess and p.filter_gene_by_counts:
        kept = totals >= p.filter_gene_by_counts
    if not kept.any():
        raise PreprocessError(f"no gene has {p.filter_gene_by_counts} counts or more; lower filter_gene_by_counts")
    return Decisions(
        genes=statistics.genes[kept],
        left_out=statistics.left_out,
        final=passes(p) == 1,
    )


def _from_kept_cells(statistics: Statistics, p: Parameters, decisions: Decisions) -> Decisions:
    if not sum(statistics.cells.values()):
        raise PreprocessError(f"no cell has {min_counts(p):g} counts or more; lower min_cell_counts")
    decided = replace(decisions, final=True)
    keeps_all = p.subset_hvg >= len(decided.genes)  # then the sample must not fail if the selection does
    if not p.subset_hvg:
        return decided
    batches = {batch: _batch_moments(statistics, batch, p) for batch in sorted(statistics.cells)}
    try:
        with _scanpy_errors(statistics, p):
            if _fits_curve(p):
                fits = {batch: fit_batch(m) for batch, m in batches.items()}
                return replace(decided, fits=fits, final=False)
            if p.batch_key:
                found = by_dispersion_in_batches(decided.genes, list(batches.values()), p.subset_hvg, p.hvg_flavor)
            else:
                found = by_dispersion(*batches[ALL].mean_var(), p.subset_hvg, p.hvg_flavor)["highly_variable"]
    except PreprocessError:
        if keeps_all:
            return decided
        raise
    if keeps_all and not found.any():
        return decided
    return _with_variable_genes(decided, found, p)


def _with_variable_genes(decisions: Decisions, found: np.ndarray, p: Parameters) -> Decisions:
    return replace(decisions, variable=with_requested_genes(found, pd.Index(decisions.genes), p))


def _by_curve(statistics: Statistics, p: Parameters, decisions: Decisions) -> Decisions:
    variances = []
    with _scanpy_errors(statistics, p):
        for batch, fit in decisions.fits.items():
            beyond, bounds = statistics.total("beyond", batch), fit.bounds
            sums = statistics.total("within", batch) + beyond * bounds
            squares = statistics.total("within squared", batch) + beyond * bounds**2
            variances.append(normalized_variance(fit, Moments(fit.cells, sums, squares)))
        found = by_normalized_variance(variances, p.subset_hvg, p.hvg_flavor)
    return _with_variable_genes(replace(decisions, fits={}, final=True), found, p)


def _batch_moments(statistics: Statistics, batch: str, p: Parameters) -> Moments:
    quantity = "expm1" if p.hvg_flavor == "seurat" else "x"
    return Moments(statistics.cells[batch], statistics.total(quantity, batch), statistics.total("square", batch))


def _fits_curve(p: Parameters) -> bool:
    return p.hvg_flavor.startswith("seurat_v3")


@contextmanager
def _scanpy_errors(statistics: Statistics, p: Parameters) -> Iterator[None]:
    try:
        with quiet_libraries():
            yield
    except HVG_ERRORS as exc:
        raise selection_error(p, sum(statistics.cells.values()), len(statistics.genes), exc) from exc

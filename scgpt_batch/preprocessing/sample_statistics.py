"""Samples larger than a row: decisions over all cells of a sample, from sums that each row contributes.

    decisions = None
    for _ in range(passes(parameters)):
        parts = [contribution(adata, parameters, decisions, …) for adata in rows]     # anywhere, any order
        decisions = decide(merge(parts), parameters, decisions)                                  # once a sample

The result is what scanpy decides on the joined AnnData (`anndata.concat(rows, join="outer")`): which genes reach the
gene filter, and which are variable among the cells that reach the cell filter. Sums are exact, so neither the cut into
rows nor their order changes a bit of them; their size is genes × batches, whatever the number of cells.
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
    cannot_choose,
    check_columns,
    min_counts,
    preprocess,
    quiet_libraries,
    with_requested_genes,
)
from scgpt_batch.preprocessing.sample_selection import BatchFit, Decisions, read_columns, write_columns

ALL = ""  # the batch of all cells where there is no batch_key
_EXPONENTS = 54  # bits of a float64 below its sign and the upper 9 of its exponent

Key = tuple[str, str, int]  # batch, what is summed, size of the summands


def rows_depend(parameters: Parameters) -> bool:
    """Tell whether a row's result depends on the other rows of its sample: on shared decisions, or shared means."""
    return parameters.need_preprocess or parameters.mode == "contextual"


def passes(parameters: Parameters) -> int:
    """How often the rows of a sample are read to decide: 1 to 3."""
    p = parameters
    if not p.need_preprocess:
        return 1
    if not (p.subset_hvg or min_counts(p)):
        return 1
    return 3 if p.subset_hvg and _fits_curve(p) else 2


@dataclass(frozen=True)
class Statistics:
    """What rows contribute to a pass: sums by gene and batch.

    Attributes
    ----------
    genes
        Names of the rows' genes, (genes,). In the order of the rows when all have one, else sorted: as anndata joins
        them.
    cells
        Cells of each batch.
    sums
        For each batch and moment the sums of summands of like size, float64, (genes,); see `exact_sums`.
    left_out
        Rows that could not be read.
    """

    genes: np.ndarray = field(default_factory=lambda: np.zeros(0, object))
    cells: Mapping[str, int] = field(default_factory=dict)
    sums: Mapping[Key, np.ndarray] = field(default_factory=dict)
    left_out: int = 0

    def merged(self, other: "Statistics") -> "Statistics":
        """Add the contributions of other rows; the order does not matter."""
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
        """Return the sums of a moment in some batches, or in all where none is named: float64, (genes,)."""
        by_size: dict[int, np.ndarray] = {}
        for (batch, what, size), values in self.sums.items():
            if what == moment and (not batches or batch in batches):
                by_size[size] = by_size.get(size, 0.0) + values
        return sum((by_size[size] for size in sorted(by_size)), np.zeros(len(self.genes)))

    def to_bytes(self) -> bytes:
        """Write as an Arrow stream."""
        keys = list(self.sums)
        columns = {"gene": self.genes} | {str(i): self.sums[key] for i, key in enumerate(keys)}
        return write_columns(columns, {"keys": keys, "cells": list(self.cells.items()), "left_out": self.left_out})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote."""
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
    """Return what a row's cells × genes contribute to the next pass.

    Parameters
    ----------
    adata
        As read and named, before preprocessing; it is changed.
    decisions
        What the passes before decided; None in the first.
    whole_numbers
        As for `preprocess`.

    Raises
    ------
    RowError
        The row cannot be preprocessed.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # values too large for scanpy: `decide` says so
        check_columns(adata, parameters)
        if decisions is None:
            sums = _sums(adata.X, adata.X.data, ALL, "x")
            return Statistics(adata.var_names.to_numpy(dtype=object), {ALL: adata.n_obs}, sums)
        adata = preprocess(adata, parameters, genes_only=True, decisions=decisions, whole_numbers=whole_numbers)
        return _after_cell_filter(adata, parameters, decisions)


def merge(parts: Iterable[Statistics]) -> Statistics:
    """Add up what rows contributed."""
    return reduce(Statistics.merged, parts, Statistics())


def decide(statistics: Statistics, parameters: Parameters, decisions: Decisions | None = None) -> Decisions:
    """Take the next decisions from the sums over all rows of a sample.

    Returns
    -------
    Decisions, final after the last pass; with an `error` where the sample has no answer.
    """
    if decisions is not None and decisions.final:
        return decisions
    if decisions is not None and statistics.left_out > decisions.left_out:  # a later pass lost more
        decisions = replace(decisions, left_out=statistics.left_out)
    try:
        if not len(statistics.genes):
            raise PreprocessError("no row of the sample can be read")
        if decisions is None:
            return _kept_genes(statistics, parameters)
        decide_next = _by_curve if decisions.fits else _of_kept_cells
        with row_errors():  # whatever scanpy raises concerns this sample alone
            return decide_next(statistics, parameters, decisions)
    except RowError as exc:
        return Decisions.failed(str(exc))


def exact_sums(columns: np.ndarray, values: np.ndarray, n_columns: int) -> dict[int, np.ndarray]:
    """Sum values by column, those of like size apart, so that no sum is rounded.

    Values are split in parts of 24 bits, and the parts by exponent in steps of 4: a float64 (53 bits) holds any sum of
    33 million of one kind exactly, in whatever order they are added.

    Parameters
    ----------
    columns, values
        Place and value of each summand; float32, or float64 of 48 bits (the square of a float32).

    Returns
    -------
    For each size that occurs the sums, float64, (n_columns,).
    """
    upper = values.astype(np.float32).astype(np.float64)
    sums: dict[int, np.ndarray] = {}
    for part in (upper, values - upper):
        held = part != 0
        summands, places = part[held], columns[held]
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
    """Sum X, and what scanpy's methods for variable genes look at; squares in the type of X, as there."""
    sums = _sums(x, x.data, batch, "x")
    if not p.subset_hvg:
        return sums
    seen = x.data
    if p.hvg_flavor == "seurat":
        seen = np.expm1(x.data)
        sums |= _sums(x, seen, batch, "expm1")
    return sums | _sums(x, np.square(seen), batch, "square")


def _clipped(x: sp.csr_matrix, batch: str, fits: Mapping[str, BatchFit]) -> dict[Key, np.ndarray]:
    """Sum the values within the bounds and count those beyond, which count as the bound."""
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
        raise PreprocessError(f"no gene reaches filter_gene_by_counts {p.filter_gene_by_counts}")
    return Decisions(
        genes=statistics.genes[kept],
        left_out=statistics.left_out,
        final=passes(p) == 1,
    )


def _of_kept_cells(statistics: Statistics, p: Parameters, decisions: Decisions) -> Decisions:
    if not sum(statistics.cells.values()):
        raise PreprocessError(f"no cell reaches {min_counts(p):g} counts")
    decided = replace(decisions, final=True)
    keeps_all = p.subset_hvg >= len(decided.genes)  # then no choice is needed
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
    seen = "expm1" if p.hvg_flavor == "seurat" else "x"
    return Moments(statistics.cells[batch], statistics.total(seen, batch), statistics.total("square", batch))


def _fits_curve(p: Parameters) -> bool:
    return p.hvg_flavor.startswith("seurat_v3")


@contextmanager
def _scanpy_errors(statistics: Statistics, p: Parameters) -> Iterator[None]:
    try:
        with quiet_libraries():
            yield
    except HVG_ERRORS as exc:
        raise cannot_choose(p, sum(statistics.cells.values()), len(statistics.genes), exc) from exc

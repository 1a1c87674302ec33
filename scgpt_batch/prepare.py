"""A row, read and preprocessed: everything between its columns and its tokens that needs no device.

Errors of a row's own data are RowErrors here, whatever library raised them.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from scgpt_batch.anndata_rows import from_row, is_empty
from scgpt_batch.decisions import Decisions
from scgpt_batch.errors import FileError, LowCoverage, PayloadError, PreprocessError, RowError
from scgpt_batch.io.hdf5_safety import open_hdf5
from scgpt_batch.model import Vocabulary
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocess import (
    COLLATOR_BINS,
    bin_values,
    binned_layer,
    cell_noise,
    check_columns,
    gene_hash,
    gene_names,
    group_labels,
    on_sample_genes,
    preprocess,
    quiet_libraries,
    sample_long_cells,
    value_warning,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowReport:
    """What was seen of a row on the way: counts for the ledger, warnings for a person."""

    cells: int = 0  # that were embedded or averaged
    genes_in: int = 0
    genes_matched: int = 0  # names found in the vocabulary
    coverage: float | None = None  # share of the row's counts that these carry
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreparedRow:
    """What the model part needs of a row.

    Attributes
    ----------
    cell_ids, groups
        Names of the cells, and each cell's group (None without `group_by`).
    genes, token_ids, n_cells
        Names of the vocabulary's genes in the row, their ids, and the cells that carry each; all (G,).
    binned
        What becomes tokens: bins of the entries that survive `max_length`, cells × G; None in static mode.
    report
        What was seen on the way.
    """

    cell_ids: np.ndarray
    groups: np.ndarray | None
    genes: np.ndarray
    token_ids: np.ndarray
    n_cells: np.ndarray
    binned: sp.csr_matrix | None
    report: RowReport


class RowReader:
    """Reads and preprocesses rows for one vocabulary. Keeps no state: safe in several threads."""

    def __init__(self, vocabulary: Vocabulary, roots: Sequence[str]) -> None:
        """Look genes up in `vocabulary`; `input_data_path` may name files below `roots`."""
        self.vocabulary = vocabulary
        self.roots = tuple(roots)

    def prepare(
        self,
        row: Mapping[str, Any],
        parameters: Parameters,
        decisions: Decisions | None = None,
    ) -> PreparedRow:
        """Read and preprocess one row, by the `decisions` of its sample where it is one of several.

        Raises
        ------
        RowError
            The row has no answer, whatever a library calls the reason; `report` on it says what was seen before.
        """
        with row_errors():
            adata, report = self.open(row, parameters)
            try:
                return self._preprocess(adata, parameters, report, decisions)
            except RowError as exc:
                exc.report = report  # type: ignore[attr-defined]  # the ledger tells it of failed rows too
                raise

    def open(self, row: Mapping[str, Any], parameters: Parameters) -> tuple[ad.AnnData, RowReport]:
        """Read one row, with the names by which the vocabulary knows its genes in var's `_name`.

        Raises
        ------
        RowError
            It cannot be read, or the vocabulary knows too few of its genes.
        """
        adata = self._read(row, parameters)
        names, name_warning = gene_names(adata.var, self.vocabulary)
        report = self._coverage(adata, names, parameters, name_warning)
        try:
            _refuse_low_coverage(report, parameters.min_coverage, name_warning)
        except RowError as exc:
            exc.report = report  # type: ignore[attr-defined]
            raise
        adata.var["_name"] = names
        return adata, report

    def _preprocess(
        self, adata: ad.AnnData, parameters: Parameters, report: RowReport, decisions: Decisions | None
    ) -> PreparedRow:
        if decisions is not None:
            check_columns(adata, parameters)
        if parameters.need_preprocess:
            adata = preprocess(adata, parameters, genes_only=parameters.mode == "static", decisions=decisions)
        elif decisions is not None:
            adata = on_sample_genes(adata, decisions)
        return self._select(adata, parameters, report, decisions)

    def _read(self, row: Mapping[str, Any], parameters: Parameters) -> ad.AnnData:
        if parameters.input_data_path and is_empty(row):
            adata = _read_file(allowed_path(parameters.input_data_path, self.roots), parameters.use_key)
        else:
            adata = from_row(row)
        # one type, so that both row formats and JSON give the same numbers
        with np.errstate(over="ignore"):
            adata.X = adata.X.astype(np.float32)
        if not np.isfinite(adata.X.data).all():
            raise PayloadError(f"X holds values beyond float32's {np.finfo(np.float32).max:.2g}")
        return adata

    def _coverage(
        self, adata: ad.AnnData, names: np.ndarray, parameters: Parameters, name_warning: str | None
    ) -> RowReport:
        known = self.vocabulary.ids(names) >= 0
        per_gene = np.asarray(adata.X.sum(axis=0, dtype=np.float64)).ravel()
        total = per_gene.sum()
        told = [name_warning]
        if not parameters.data_is_binned:
            told.append(value_warning(adata, data_is_raw=parameters.data_is_raw))
        return RowReport(
            cells=adata.n_obs,
            genes_in=adata.n_vars,
            genes_matched=int(known.sum()),
            coverage=float(per_gene[known].sum() / total) if total else 0.0,
            warnings=tuple(w for w in told if w),
        )

    def _select(
        self, adata: ad.AnnData, parameters: Parameters, report: RowReport, decisions: Decisions | None
    ) -> PreparedRow:
        """Keep the vocabulary's genes; bin before that where upstream's Preprocessor does."""
        names = adata.var["_name"].to_numpy(dtype=object)
        ids = self.vocabulary.ids(names)
        binned = None
        if parameters.mode != "static":
            matrix = binned_layer(adata, parameters) if parameters.need_preprocess else adata.X
            if parameters.need_preprocess:
                matrix = bin_matrix(matrix, names, parameters, parameters.binning)
        columns, extra_warning = _one_column_a_token(ids, lambda: _totals(adata, decisions))
        if not len(columns):
            raise PreprocessError("no gene that survives preprocessing is in the vocabulary")
        if parameters.mode != "static":
            binned = sp.csr_matrix(matrix[:, columns])
            if not (parameters.need_preprocess or parameters.data_is_binned):
                binned = bin_matrix(binned, names[columns], parameters, COLLATOR_BINS)
        n_cells = adata.var["n_cells"].to_numpy() if adata.is_view else adata.X.getnnz(axis=0)
        told = (extra_warning, _empty_cells_warning(binned), decisions and decisions.warning)
        extra = [w for w in told if w]
        return PreparedRow(
            cell_ids=adata.obs_names.to_numpy(dtype=object),
            groups=group_labels(adata, parameters.group_by) if parameters.group_by else None,
            genes=names[columns],
            token_ids=ids[columns],
            n_cells=n_cells[columns].astype(np.int32),
            binned=None if binned is None else _sampled(binned, names[columns], parameters),
            report=replace(report, cells=adata.n_obs, warnings=(*report.warnings, *extra)),
        )


def given_decisions(row: Mapping[str, Any]) -> Decisions | None:
    """Return the decisions that a row of a larger sample carries; a PayloadError where they are none."""
    given = row.get("decisions")
    if given is None or isinstance(given, Decisions):
        return given
    if not isinstance(given, bytes):
        raise PayloadError(f"decisions: {type(given).__name__} given where bytes are due")
    try:
        return _decisions(given)
    except (pa.ArrowException, KeyError, TypeError, ValueError) as exc:
        raise PayloadError(f"decisions: not what the passes over the sample wrote: {exc}") from exc


@lru_cache(maxsize=4)  # rows of a sample come side by side
def _decisions(data: bytes) -> Decisions:
    return Decisions.from_bytes(data)


@contextmanager
def row_errors() -> Iterator[None]:
    """Raise what a library raises as an error of the row."""
    try:
        yield
    except (RowError, MemoryError):
        raise
    except Exception as exc:
        logger.exception("a row could not be prepared")
        raise PreprocessError(f"{type(exc).__name__}: {exc}") from exc


def allowed_path(path: str, roots: Iterable[str]) -> Path:
    """Return the real path if it lies below one of `roots`; a PayloadError otherwise.

    Links are followed before the comparison, and `..` is refused outright.
    """
    allowed = [Path(root).resolve() for root in roots]
    if not allowed:
        raise PayloadError("input_data_path is not allowed: no root was listed when the model was registered")
    real = Path(path).resolve()
    if ".." in Path(path).parts or not any(real.is_relative_to(root) for root in allowed):
        raise PayloadError(f"input_data_path {path!r} does not lie below a root listed at registration")
    if not real.is_file():
        raise PayloadError(f"input_data_path {path!r} is no file")
    return real


def _read_file(path: Path, use_key: str) -> ad.AnnData:
    """Read an .h5ad and check it as a row is checked; of its layers, the one that is used."""
    try:
        # names given twice: the check below refuses them
        with quiet_libraries(), open_hdf5(path):
            held = ad.read_h5ad(path)
    except (FileError, OSError, KeyError, ValueError) as exc:
        raise PayloadError(f"input_data_path: {path.name} cannot be read as .h5ad: {exc}") from exc

    def checked(matrix: Any, key: str) -> ad.AnnData:
        if matrix is None:
            raise PayloadError(f"input_data_path: {path.name} has no {key}")
        row = {"adata_sparsematrix": sp.csr_matrix(matrix), "adata_obs": held.obs, "adata_var": held.var}
        try:
            return from_row(row)
        except PayloadError as exc:
            raise PayloadError(f"input_data_path: {path.name}, {key}: {exc}") from exc

    adata = checked(held.X, "X")
    if use_key in held.layers:
        adata.layers[use_key] = checked(held.layers[use_key], use_key).X
    return adata


def _empty_cells_warning(binned: sp.csr_matrix | None) -> str | None:
    """Say when cells have nothing for the model to see: their answers are all alike."""
    empty = 0 if binned is None else int((np.diff(binned.indptr) == 0).sum())
    return f"{empty} cells carry no gene of the vocabulary: what they give is that of <cls> alone" if empty else None


def bin_matrix(matrix: sp.csr_matrix, names: np.ndarray, parameters: Parameters, n_bins: int) -> sp.csr_matrix:
    """Put bins in the place of values, cells × genes; `names` are the genes', by which ties are drawn."""
    matrix = sp.csr_matrix(matrix)
    hashes = gene_hash(names)[matrix.indices.astype(np.intp)]  # numpy is twice as fast with its own index type
    bins = bin_values(matrix.data, matrix.indptr, hashes, parameters, n_bins=n_bins)
    return sp.csr_matrix((bins, matrix.indices, matrix.indptr), matrix.shape)


def _sampled(binned: sp.csr_matrix, names: np.ndarray, parameters: Parameters) -> sp.csr_matrix:
    """Leave `max_length` - 1 entries to each longer cell."""
    lengths = np.diff(binned.indptr)
    if lengths.max(initial=0) <= parameters.max_length - 1:
        return binned
    noise = cell_noise(binned.data, binned.indptr, gene_hash(names)[binned.indices], parameters.seed, stream=1)
    keep = sample_long_cells(binned.indptr, noise, parameters.max_length)
    indptr = np.concatenate([[0], np.cumsum(np.minimum(lengths, parameters.max_length - 1))])
    return sp.csr_matrix((binned.data[keep], binned.indices[keep], indptr), binned.shape)


def _totals(adata: ad.AnnData, decisions: Decisions | None) -> np.ndarray:
    """Sum each gene's values, over the sample where the row is one of several."""
    if decisions is None:
        return np.asarray(adata.X.sum(axis=0)).ravel()
    return decisions.totals if decisions.variable is None else decisions.totals[decisions.variable]


def _one_column_a_token(ids: np.ndarray, totals: Callable[[], np.ndarray]) -> tuple[np.ndarray, str | None]:
    """Choose the columns of the vocabulary's genes; of columns mapped to one symbol, the one with most counts."""
    columns = np.flatnonzero(ids >= 0)
    if len(np.unique(ids[columns])) == len(columns):
        return columns, None
    by_total = columns[np.argsort(-totals()[columns], kind="stable")]
    _, first = np.unique(ids[by_total], return_index=True)
    kept = np.sort(by_total[first])
    return kept, f"{len(columns) - len(kept)} genes map to a symbol taken by another with more counts: left out"


def _refuse_low_coverage(report: RowReport, min_coverage: float, name_warning: str | None) -> None:
    coverage = report.coverage or 0.0
    if report.genes_matched and coverage >= min_coverage:
        return
    hint = f"; {name_warning}" if name_warning else ""
    raise LowCoverage(
        f"{report.genes_matched} of {report.genes_in} gene names are in the vocabulary and carry {coverage:.1%} of "
        f"the counts, {min_coverage:.1%} are wanted{hint}"
    )

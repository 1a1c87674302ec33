"""A row, read and preprocessed: everything between its columns and its tokens that needs no device.

Errors of a row's own data are RowErrors here, whatever library raised them.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from traceback import format_exception
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from scgpt_batch.anndata_rows import (
    SHARED_LENGTH,
    SHARED_TABLES,
    RowContent,
    as_float32,
    genes_from_json,
    is_empty,
    missing_warning,
    read_row,
    to_row,
)
from scgpt_batch.decisions import Decisions
from scgpt_batch.errors import (
    FileError,
    InternalError,
    LowCoverage,
    PayloadError,
    PreprocessError,
    RowError,
    indented,
    plain_line,
)
from scgpt_batch.gene_names import GeneSelection, select_genes
from scgpt_batch.io.hdf5_safety import open_hdf5
from scgpt_batch.model import Vocabulary
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocess import (
    COLLATOR_BINS,
    batch_labels,
    bin_values,
    binned_layer,
    cell_noise,
    check_columns,
    gene_hash,
    group_labels,
    on_sample_genes,
    preprocess,
    quiet_libraries,
    sample_long_cells,
    value_warning,
)

logger = logging.getLogger(__name__)

DATA_ERRORS = (ValueError, ArithmeticError, np.linalg.LinAlgError)  # of libraries, for values that they cannot take


@dataclass(frozen=True)
class RowReport:
    """What was seen of a row on the way: counts for the ledger, warnings for a person."""

    cells: int = 0  # that were embedded or averaged
    genes_in: int = 0
    genes_matched: int = 0  # names found in the vocabulary
    coverage: float | None = None  # share of the row's counts that these carry
    warnings: tuple[str, ...] = ()  # each one line of bounded length

    def __post_init__(self) -> None:
        """Shorten the warnings and escape control characters: names from the row stand in them."""
        object.__setattr__(self, "warnings", tuple(map(plain_line, self.warnings)))


@dataclass(frozen=True)
class OpenRow:
    """A row as the model sees it, before preprocessing.

    Attributes
    ----------
    adata
        Cells × genes in float32; var's names are those of the vocabulary, each once, and var has no columns.
    report
        What was seen so far.
    whole_numbers
        X was of an integer type or bool.
    """

    adata: ad.AnnData
    report: RowReport
    whole_numbers: bool


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
    """Reads and preprocesses rows for one vocabulary. Safe in several threads."""

    def __init__(self, vocabulary: Vocabulary, roots: Sequence[str]) -> None:
        """Look genes up in `vocabulary`; `input_data_path` may name files below `roots`."""
        self.vocabulary = vocabulary
        self.roots = tuple(roots)
        # the genes of a file or sample come with each of its rows
        self._shared_selection = lru_cache(maxsize=SHARED_TABLES)(self._select_shared_genes)

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
            opened = self.open(row, parameters)
            try:
                return self._preprocess(opened, parameters, decisions)
            except RowError as exc:
                exc.report = opened.report  # type: ignore[attr-defined]  # the ledger tells it of failed rows too
                raise

    def open(self, row: Mapping[str, Any], parameters: Parameters) -> OpenRow:
        """Read one row and apply the rules for values and names: what every way into the model has in common.

        Raises
        ------
        RowError
            It cannot be read, or the vocabulary knows too few of its genes.
        """
        content, layers, told = self._read(row, parameters)
        genes = self._genes(row, content)
        x, rounded = as_float32(content.x, content.var.index)
        adata = ad.AnnData(genes.apply(x), obs=content.obs, var=pd.DataFrame(index=genes.names))
        for name, layer in layers.items():
            adata.layers[name] = genes.apply(as_float32(layer, content.var.index)[0])
        report = self._report(adata, genes, parameters, (*told, *content.warnings, rounded))
        try:
            _refuse_low_coverage(report, parameters.min_coverage, genes.hint)
        except RowError as exc:
            exc.report = report  # type: ignore[attr-defined]
            raise
        return OpenRow(adata, report, whole_numbers=content.x.dtype.kind in "biu")

    def _preprocess(self, opened: OpenRow, parameters: Parameters, decisions: Decisions | None) -> PreparedRow:
        adata = opened.adata
        if decisions is not None:
            check_columns(adata, parameters)
        if parameters.need_preprocess:
            adata = preprocess(
                adata,
                parameters,
                genes_only=parameters.mode == "static",
                decisions=decisions,
                whole_numbers=opened.whole_numbers,
            )
        elif decisions is not None:
            adata = on_sample_genes(adata, decisions)
        return self._select(adata, parameters, opened.report, decisions)

    def _read(
        self, row: Mapping[str, Any], parameters: Parameters
    ) -> tuple[RowContent, dict[str, sp.csr_matrix], list[str]]:
        """Return the row's content, or the named file's, its other layers in use, and warnings."""
        if parameters.input_data_path and is_empty(row):
            path = allowed_path(parameters.input_data_path, self.roots)
            return _read_file(path, parameters)
        if parameters.use_key != "X" and not parameters.need_preprocess:
            raise PayloadError(f"use_key {parameters.use_key!r} is not a layer of the row: a row holds X alone")
        return read_row(row), {}, []

    def _genes(self, row: Mapping[str, Any], content: RowContent) -> GeneSelection:
        """Choose the row's genes, once for the rows that share `adata_var`."""
        text = row.get("adata_var")
        return self.genes_of(text) if isinstance(text, str) else select_genes(content.var, self.vocabulary)

    def genes_of(self, text: str) -> GeneSelection:
        """Choose the genes of a JSON table (`adata_var`), once for the rows that share it.

        Raises
        ------
        PayloadError
            It cannot be read, or holds no gene expression.
        """
        if len(text) <= SHARED_LENGTH:
            return self._shared_selection(text)
        return select_genes(genes_from_json(text), self.vocabulary)

    def _select_shared_genes(self, text: str) -> GeneSelection:
        genes = select_genes(genes_from_json(text), self.vocabulary)
        genes.names.is_unique  # noqa: B018  # builds the hash table before several threads look names up in it
        return genes

    def _report(self, adata: ad.AnnData, genes: GeneSelection, p: Parameters, told: Iterable[str | None]) -> RowReport:
        # in float64: float32 loses counts from 2^24 on
        total = adata.X.data.sum(dtype=np.float64)
        matched = (adata.X @ genes.known.astype(np.float64)).sum()
        warnings = [*told, *genes.warnings]
        if not p.data_is_binned:
            warnings.append(value_warning(adata, data_is_raw=p.data_is_raw))
        warnings += _missing_labels(adata, p)
        return RowReport(
            cells=adata.n_obs,
            genes_in=genes.genes_in,
            genes_matched=genes.genes_matched,
            coverage=float(matched / total) if total else 0.0,
            warnings=tuple(w for w in warnings if w),
        )

    def _select(
        self, adata: ad.AnnData, parameters: Parameters, report: RowReport, decisions: Decisions | None
    ) -> PreparedRow:
        """Keep the vocabulary's genes; bin before that where upstream's Preprocessor does."""
        names = adata.var_names.to_numpy(dtype=object)
        ids = self.vocabulary.ids(names)
        binned = None
        if parameters.mode != "static":
            matrix = binned_layer(adata, parameters) if parameters.need_preprocess else adata.X
            if parameters.need_preprocess:
                matrix = bin_matrix(matrix, names, parameters, parameters.binning)
        columns = np.flatnonzero(ids >= 0)
        if not len(columns):
            raise PreprocessError("no gene that survives preprocessing is in the vocabulary")
        if parameters.mode != "static":
            binned = sp.csr_matrix(matrix[:, columns])
            if not (parameters.need_preprocess or parameters.data_is_binned):
                binned = bin_matrix(binned, names[columns], parameters, COLLATOR_BINS)
        n_cells = adata.var["n_cells"].to_numpy() if adata.is_view else adata.X.getnnz(axis=0)
        told = (_empty_cells_warning(binned), decisions and decisions.warning)
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
    """Raise what a library raises for a row's data as an error of the row.

    scanpy, scipy and pandas refuse values by these classes. Any other exception is a fault of the code and becomes an
    InternalError, so that the row is tried again with another version of it. A missing package concerns all rows and
    passes.
    """
    try:
        yield
    except (RowError, MemoryError, ImportError):
        raise
    except DATA_ERRORS as exc:
        _log_fault(exc)
        raise PreprocessError(f"{type(exc).__name__}: {exc}") from exc
    except Exception as exc:
        _log_fault(exc)
        raise InternalError(f"{type(exc).__name__}: {exc}; this is a fault of the package, please report it") from exc


def _log_fault(exc: Exception) -> None:
    """Log a library's error with its traceback; not by `exception`: Spark's workers log without our filter."""
    logger.error("a row could not be prepared\n    %s", indented("".join(format_exception(exc))))


def allowed_path(path: str, roots: Iterable[str]) -> Path:
    """Return the real path if it lies below one of `roots`; a PayloadError otherwise.

    Links are followed before the comparison, and `..` is refused outright. A folder must be a .zarr, and no link in it
    may lead out of the roots.
    """
    allowed = [Path(root).resolve() for root in roots]
    if not allowed:
        raise PayloadError("input_data_path is not allowed: no root was listed when the model was registered")
    real = Path(path).resolve()

    def is_below(place: Path) -> bool:
        return any(place.is_relative_to(root) for root in allowed)

    if ".." in Path(path).parts or not is_below(real):
        raise PayloadError(f"input_data_path {path!r} does not lie below a root listed at registration")
    if real.is_dir() and real.suffix == ".zarr":
        if not all(is_below(part.resolve()) for part in real.rglob("*")):
            raise PayloadError(f"input_data_path {path!r} contains links out of the roots listed at registration")
    elif not real.is_file():
        raise PayloadError(f"input_data_path {path!r} is not an .h5ad file or a .zarr folder")
    return real


def _read_file(path: Path, p: Parameters) -> tuple[RowContent, dict[str, sp.csr_matrix], list[str]]:
    """Read a file and check it as a row is checked; of its layers, the one that is used.

    Without preprocessing the layer takes the place of X, which is not looked at then.
    """
    try:
        with quiet_libraries(), nullcontext() if path.is_dir() else open_hdf5(path):  # warnings of repeated names
            file = ad.read_zarr(path) if path.is_dir() else ad.read_h5ad(path)
    except (FileError, OSError, KeyError, ValueError) as exc:
        raise PayloadError(f"input_data_path: {path.name} cannot be read as .h5ad or .zarr: {exc}") from exc
    told: list[str] = []

    def content(layer: str | None) -> RowContent:
        try:
            return read_row(to_row(file, layer=layer, warnings=told))
        except PayloadError as exc:
            raise PayloadError(f"input_data_path: {path.name}: {exc}") from exc

    layer = None if p.use_key == "X" else p.use_key
    if layer is None or not p.need_preprocess:
        return content(layer), {}, told
    return content(None), {p.use_key: content(layer).x}, told


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


def _missing_labels(adata: ad.AnnData, p: Parameters) -> list[str | None]:
    """Say how many cells have no group or batch; a column that obs lacks is an error later."""
    told = []
    if p.group_by in adata.obs:
        told.append(missing_warning(group_labels(adata, p.group_by), p.group_by))
    if p.need_preprocess and p.subset_hvg and p.batch_key in adata.obs:
        told.append(missing_warning(batch_labels(adata, p), p.batch_key))
    return told


def _refuse_low_coverage(report: RowReport, min_coverage: float, hint: str) -> None:
    coverage = report.coverage or 0.0
    if report.genes_matched and coverage >= min_coverage:
        return
    matched = f"{report.genes_matched} of {report.genes_in} gene names are in the vocabulary"
    if report.genes_matched:
        matched += f" and carry {coverage:.1%} of the counts; min_coverage requires {min_coverage:.1%}"
    raise LowCoverage(f"{matched}. {hint}" if hint else matched)

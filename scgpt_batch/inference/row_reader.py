"""Reading and preprocessing of rows, from table columns to tokens.

Exceptions that libraries raise for the data of a row are converted to RowErrors here.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scgpt_batch.errors import FileError, LowCoverage, PayloadError, RowError, row_errors
from scgpt_batch.inference.results import RowReport
from scgpt_batch.io.hdf5_safety import open_hdf5
from scgpt_batch.io.locations import canonical
from scgpt_batch.io.rows import (
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
from scgpt_batch.models.interface import CellTokens
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.gene_names import GeneSelection, select_genes
from scgpt_batch.preprocessing.pipeline import (
    batch_labels,
    group_labels,
    quiet_libraries,
    value_warning,
)
from scgpt_batch.preprocessing.sample_selection import Decisions
from scgpt_batch.preprocessing.tokens import ScgptTokenizer, TokenizedRow

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenRow:
    """A row whose genes are matched to the vocabulary, before preprocessing.

    Attributes
    ----------
    adata
        Cells × genes in float32, with unique gene names and no columns in var.
    report
        Counts and warnings so far.
    whole_numbers
        Whether X had an integer type or bool.
    """

    adata: ad.AnnData
    report: RowReport
    whole_numbers: bool


@dataclass(frozen=True)
class PreparedRow(TokenizedRow):
    """A tokenized row with its report.

    Attributes
    ----------
    report
        Counts and warnings.
    """

    report: RowReport


class RowReader:
    """Reads and tokenizes rows for one model. Thread-safe.

    Parameters
    ----------
    tokenizer
        Tokenizer of the model.
    roots
        Folders below which `input_data_path` may name files.
    """

    def __init__(self, tokenizer: ScgptTokenizer, roots: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = tokenizer.vocabulary
        self.roots = tuple(roots)
        # all rows of a file or sample have the same genes
        self._shared_selection = lru_cache(maxsize=SHARED_TABLES)(self._select_shared_genes)

    def prepare(
        self,
        row: Mapping[str, Any],
        parameters: Parameters,
        decisions: Decisions | None = None,
    ) -> PreparedRow:
        """Return one row, preprocessed and tokenized.

        Parameters
        ----------
        row
            The payload columns.
        parameters
            The parameters.
        decisions
            Decisions of the sample; None if the row is its own sample.

        Raises
        ------
        RowError
            The row cannot be embedded; the `report` of the error has the counts and warnings so far.
        """
        with row_errors():
            opened = self.open(row, parameters)
            try:
                return self._tokenize(opened, parameters, decisions)
            except RowError as exc:
                exc.report = opened.report  # written to the ledger
                raise

    def open(self, row: Mapping[str, Any], parameters: Parameters) -> OpenRow:
        """Return one row with validated values and matched gene names, before preprocessing.

        Raises
        ------
        RowError
            The row cannot be read, or the genes in the vocabulary carry too small a share of its counts.
        """
        content, layers, messages = self._read(row, parameters)
        genes = self._genes(row, content)
        x, rounded = as_float32(content.x, content.var.index)
        adata = ad.AnnData(genes.apply(x), obs=content.obs, var=pd.DataFrame(index=genes.names))
        for name, layer in layers.items():
            adata.layers[name] = genes.apply(as_float32(layer, content.var.index)[0])
        report = self._report(adata, genes, parameters, (*messages, *content.warnings, rounded))
        try:
            _check_coverage(report, parameters.min_coverage, genes.hint)
        except RowError as exc:
            exc.report = report
            raise
        return OpenRow(adata, report, whole_numbers=content.x.dtype.kind in "biu")

    def _tokenize(self, opened: OpenRow, parameters: Parameters, decisions: Decisions | None) -> PreparedRow:
        row = self.tokenizer.tokenize(opened.adata, parameters, decisions, whole_numbers=opened.whole_numbers)
        added = [w for w in (_empty_cells_warning(row.cells), decisions and decisions.warning) if w]
        warnings = (*opened.report.warnings, *added)
        report = replace(opened.report, cells=len(row.cell_ids), warnings=warnings)
        return PreparedRow(**vars(row), report=report)

    def _read(
        self, row: Mapping[str, Any], parameters: Parameters
    ) -> tuple[RowContent, dict[str, sp.csr_matrix], list[str]]:
        """Return the content of the row (or of `input_data_path`), the layer that is normalised, and warnings."""
        if parameters.input_data_path and is_empty(row):
            path = allowed_path(parameters.input_data_path, self.roots)
            return _read_file(path, parameters)
        if parameters.use_key != "X" and not parameters.need_preprocess:
            raise PayloadError(
                f"use_key {parameters.use_key!r} is not a layer of the row: rows have only X; set use_key to 'X'"
            )
        return read_row(row), {}, []

    def _genes(self, row: Mapping[str, Any], content: RowContent) -> GeneSelection:
        """Return the genes of a row, cached for rows with the same `adata_var`."""
        text = row.get("adata_var")
        return self.genes_of(text) if isinstance(text, str) else select_genes(content.var, self.vocabulary)

    def genes_of(self, text: str) -> GeneSelection:
        """Return the genes of a JSON table (`adata_var`), cached for rows with the same table.

        Raises
        ------
        PayloadError
            The table cannot be read, or contains no gene expression features.
        """
        if len(text) <= SHARED_LENGTH:
            return self._shared_selection(text)
        return select_genes(genes_from_json(text), self.vocabulary)

    def _select_shared_genes(self, text: str) -> GeneSelection:
        genes = select_genes(genes_from_json(text), self.vocabulary)
        genes.names.is_unique  # noqa: B018  # builds the hash table, which is not thread-safe, before threads use it
        return genes

    def _report(
        self, adata: ad.AnnData, genes: GeneSelection, p: Parameters, messages: Iterable[str | None]
    ) -> RowReport:
        # float64, because float32 sums of counts are not exact above 2^24
        total = adata.X.data.sum(dtype=np.float64)
        matched = (adata.X @ genes.known.astype(np.float64)).sum()
        warnings = [*messages, *genes.warnings]
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


def allowed_path(path: str, roots: Iterable[str]) -> Path:
    """Return the real path of a file or .zarr folder below one of `roots`.

    Links are resolved before the comparison, also those inside a .zarr folder.

    Raises
    ------
    PayloadError
        The path is outside the roots, contains "..", or is neither a file nor a .zarr folder.
    """
    allowed = [Path(root).resolve() for root in roots]
    if not allowed:
        raise PayloadError(
            "input_data_path is not allowed: the model was registered without roots; register it with --input-roots"
        )
    given = Path(canonical(path) if path.startswith("dbfs:") else path)
    real = given.resolve()

    def is_below(place: Path) -> bool:
        return any(place.is_relative_to(root) for root in allowed)

    if ".." in given.parts or not is_below(real):
        raise PayloadError(f"input_data_path {path!r} is not below one of the --input-roots of the registered model")
    if real.is_dir() and real.suffix == ".zarr":
        if not all(is_below(part.resolve()) for part in real.rglob("*")):
            raise PayloadError(f"input_data_path {path!r} contains links to places outside the --input-roots")
    elif not real.is_file():
        raise PayloadError(f"input_data_path {path!r} is not an .h5ad file or a .zarr folder")
    return real


def _read_file(path: Path, p: Parameters) -> tuple[RowContent, dict[str, sp.csr_matrix], list[str]]:
    """Return the validated content of a file, the layer `use_key` if it is normalised, and warnings.

    Without preprocessing, the layer `use_key` is read instead of X.
    """
    try:
        # open_hdf5 checks the file; anndata warns about repeated names, which are handled later
        with quiet_libraries(), nullcontext() if path.is_dir() else open_hdf5(path):
            file = ad.read_zarr(path) if path.is_dir() else ad.read_h5ad(path)
    except (FileError, OSError, KeyError, ValueError) as exc:
        raise PayloadError(f"input_data_path: {path.name} cannot be read as .h5ad or .zarr: {exc}") from exc
    messages: list[str] = []

    def content(layer: str | None) -> RowContent:
        try:
            return read_row(to_row(file, layer=layer, warnings=messages))
        except PayloadError as exc:
            raise PayloadError(f"input_data_path: {path.name}: {exc}") from exc

    layer = None if p.use_key == "X" else p.use_key
    if layer is None or not p.need_preprocess:
        return content(layer), {}, messages
    return content(None), {p.use_key: content(layer).x}, messages


def _empty_cells_warning(cells: CellTokens | None) -> str | None:
    """Return a warning if cells express no gene of the vocabulary, so that their embeddings are all the same."""
    empty = 0 if cells is None else int((cells.lengths == 1).sum())
    return f"{empty} cells express no gene of the vocabulary: they all get the vector of <cls> alone" if empty else None


def _missing_labels(adata: ad.AnnData, p: Parameters) -> list[str | None]:
    """Return warnings about cells without group or batch. A missing obs column raises an error later."""
    warnings = []
    if p.group_by in adata.obs:
        warnings.append(missing_warning(group_labels(adata, p.group_by), p.group_by))
    if p.need_preprocess and p.subset_hvg and p.batch_key in adata.obs:
        warnings.append(missing_warning(batch_labels(adata, p), p.batch_key))
    return warnings


def _check_coverage(report: RowReport, min_coverage: float, hint: str) -> None:
    coverage = report.coverage or 0.0
    if report.genes_matched and coverage >= min_coverage:
        return
    matched = f"{report.genes_matched} of {report.genes_in} gene names are in the vocabulary"
    if report.genes_matched:
        matched += f" and carry {coverage:.1%} of the counts; min_coverage requires {min_coverage:.1%}"
    raise LowCoverage(f"{matched}. {hint}" if hint else matched)

"""A row, read and preprocessed: everything between its columns and its tokens that needs no device.

Errors of a row's own data are RowErrors here, whatever library raised them.
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
class PreparedRow(TokenizedRow):
    """A row, read and tokenized.

    Attributes
    ----------
    report
        What was counted on the way.
    """

    report: RowReport


class RowReader:
    """Reads and tokenizes rows for one model. Safe in several threads."""

    def __init__(self, tokenizer: ScgptTokenizer, roots: Sequence[str]) -> None:
        """Tokenize by `tokenizer`; `input_data_path` may name files below `roots`."""
        self.tokenizer = tokenizer
        self.vocabulary = tokenizer.vocabulary
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
                return self._tokenize(opened, parameters, decisions)
            except RowError as exc:
                exc.report = opened.report  # for the ledger's line of the failed row
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


def _empty_cells_warning(cells: CellTokens | None) -> str | None:
    """Say when cells have no gene for the model to see: their embeddings are all alike."""
    empty = 0 if cells is None else int((cells.lengths == 1).sum())
    return f"{empty} cells carry no gene of the vocabulary: what they give is that of <cls> alone" if empty else None


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

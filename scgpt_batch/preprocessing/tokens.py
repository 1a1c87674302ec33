"""Conversion of a row into scGPT tokens: preprocessing, binning, sampling of long cells, and `<cls>` for each cell."""

from dataclasses import dataclass

import anndata as ad
import numpy as np
import scipy.sparse as sp

from scgpt_batch.errors import PreprocessError
from scgpt_batch.models.interface import CellTokens, Tokens
from scgpt_batch.models.scgpt.vocabulary import Vocabulary
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.binning import COLLATOR_BINS, bin_matrix, cell_noise, gene_hash
from scgpt_batch.preprocessing.pipeline import binned_layer, check_columns, group_labels, on_sample_genes, preprocess
from scgpt_batch.preprocessing.sample_selection import Decisions

PAD_VALUE = -2  # value of <cls> in the published model


@dataclass(frozen=True)
class BinnedCells:
    """The binned cells of one row.

    Attributes
    ----------
    binned
        Bins, cells × G; each stored entry is a token, including explicit zeros.
    token_ids
        Token id of each gene, (G,).
    cls_id, cls_value
        Token id and value of `<cls>`.
    """

    binned: sp.csr_matrix
    token_ids: np.ndarray
    cls_id: int
    cls_value: float

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each cell, including `<cls>`: int64, (cells,)."""
        return np.diff(self.binned.indptr).astype(np.int64) + 1

    @property
    def expressed(self) -> np.ndarray:
        """Whether any cell has a token of each gene: bool, (G,)."""
        return self.binned.getnnz(axis=0) > 0

    def tokens(self, cells: np.ndarray) -> tuple[Tokens, np.ndarray]:
        """Return the tokens of some cells, and the gene (column) of each token, -1 for `<cls>`."""
        return tokenize(self.binned[cells], self.token_ids, cls_id=self.cls_id, cls_value=self.cls_value)


@dataclass(frozen=True)
class TokenizedRow:
    """A row that is ready for the model.

    Attributes
    ----------
    cell_ids, groups
        Name of each cell, and its group (None without `group_by`).
    genes, token_ids, n_cells
        The row's genes that are in the vocabulary: names, token ids, and number of cells that express each; all (G,).
    cells
        The tokens of the cells; None in static mode.
    """

    cell_ids: np.ndarray
    groups: np.ndarray | None
    genes: np.ndarray
    token_ids: np.ndarray
    n_cells: np.ndarray
    cells: CellTokens | None


class ScgptTokenizer:
    """Converts rows into scGPT tokens. Thread-safe.

    Parameters
    ----------
    vocabulary
        Token ids of the genes.
    pad_value
        Value of the `<cls>` token.
    """

    def __init__(self, vocabulary: Vocabulary, pad_value: float = PAD_VALUE) -> None:
        self.vocabulary = vocabulary
        self.pad_value = pad_value

    def tokenize(
        self, adata: ad.AnnData, parameters: Parameters, decisions: Decisions | None, *, whole_numbers: bool
    ) -> TokenizedRow:
        """Return a row, preprocessed, restricted to the genes of the vocabulary, and binned (not in static mode).

        Parameters
        ----------
        adata
            Cells × genes, X in CSR and float32. Modified.
        parameters
            The parameters.
        decisions
            Decisions of the sample that the row belongs to; None if the row is its own sample.
        whole_numbers
            See `preprocess`.

        Raises
        ------
        RowError
            No gene or cell remains, or a column or layer is missing.
        """
        p, is_static = parameters, parameters.mode == "static"
        if decisions is not None:
            check_columns(adata, p)
        if p.need_preprocess:
            adata = preprocess(adata, p, genes_only=is_static, decisions=decisions, whole_numbers=whole_numbers)
        elif decisions is not None:
            adata = on_sample_genes(adata, decisions)
        names = adata.var_names.to_numpy(dtype=object)
        ids = self.vocabulary.ids(names)
        columns = np.flatnonzero(ids >= 0)
        if not len(columns):
            raise PreprocessError(
                f"none of the {len(names)} genes left after preprocessing is in the vocabulary; keep more genes, e.g. "
                "with subset_hvg or filter_gene_by_counts"
            )
        has_counts = p.need_preprocess and is_static  # then adata is a view, and reading X would copy it
        n_cells = adata.var["n_cells"].to_numpy() if has_counts else adata.X.getnnz(axis=0)
        cells = None
        if not is_static:
            binned = _binned(adata, names, columns, p)
            cells = BinnedCells(binned, ids[columns], self.vocabulary.cls_id, self.pad_value)
        return TokenizedRow(
            cell_ids=adata.obs_names.to_numpy(dtype=object),
            groups=group_labels(adata, p.group_by) if p.group_by else None,
            genes=names[columns],
            token_ids=ids[columns],
            n_cells=n_cells[columns].astype(np.int32),
            cells=cells,
        )


def _binned(adata: ad.AnnData, names: np.ndarray, columns: np.ndarray, p: Parameters) -> sp.csr_matrix:
    """Return the binned genes of the vocabulary.

    With preprocessing, bins are computed from all genes, as in upstream's Preprocessor; without it, only from genes of
    the vocabulary, as in upstream's data collator.
    """
    if p.need_preprocess:
        matrix = bin_matrix(binned_layer(adata, p), names, p, p.binning)
        binned = sp.csr_matrix(matrix[:, columns])
    else:
        binned = sp.csr_matrix(adata.X[:, columns])
        if not p.data_is_binned:
            binned = bin_matrix(binned, names[columns], p, COLLATOR_BINS)
    return _sampled(binned, names[columns], p)


def _sampled(binned: sp.csr_matrix, names: np.ndarray, parameters: Parameters) -> sp.csr_matrix:
    """Return the matrix with a random sample of `max_length` - 1 entries of each longer cell."""
    lengths = np.diff(binned.indptr)
    if lengths.max(initial=0) <= parameters.max_length - 1:
        return binned
    noise = cell_noise(binned.data, binned.indptr, gene_hash(names)[binned.indices], parameters.seed, stream=1)
    keep = sample_long_cells(binned.indptr, noise, parameters.max_length)
    indptr = np.concatenate([[0], np.cumsum(np.minimum(lengths, parameters.max_length - 1))])
    return sp.csr_matrix((binned.data[keep], binned.indices[keep], indptr), binned.shape)


def tokenize(
    matrix: sp.csr_matrix, gene_ids: np.ndarray, *, cls_id: int, cls_value: float
) -> tuple[Tokens, np.ndarray]:
    """Return the tokens of each cell: `<cls>`, then its stored entries in the order of the matrix.

    Parameters
    ----------
    matrix
        Binned values, cells × genes; explicit zeros are tokens too.
    gene_ids
        Token id of each gene (column); none may be -1.
    cls_id, cls_value
        Token id and value of `<cls>`.

    Returns
    -------
    The tokens, and the column of each token's gene, int64, (T,); -1 for `<cls>`.
    """
    lengths = np.diff(matrix.indptr).astype(np.int64) + 1
    starts = np.cumsum(lengths) - lengths
    columns = np.empty(int(lengths.sum()), np.int64)
    is_gene = np.ones(len(columns), bool)
    is_gene[starts] = False
    columns[is_gene] = matrix.indices
    columns[starts] = -1
    genes, values = np.empty(len(columns), np.int64), np.empty(len(columns), np.float32)
    genes[is_gene], values[is_gene] = gene_ids[matrix.indices.astype(np.intp)], matrix.data
    genes[starts], values[starts] = cls_id, cls_value
    return Tokens(genes, values, lengths), columns


def sample_long_cells(indptr: np.ndarray, noise: np.ndarray, max_length: int) -> np.ndarray | None:
    """Return a mask of the entries to keep, `max_length` - 1 of each longer cell; None if no cell is longer.

    Parameters
    ----------
    indptr
        Start of each cell, (B + 1,).
    noise
        A random number for each entry, from `cell_noise`, (nnz,). The entries with the smallest numbers are kept.
    max_length
        Maximum number of tokens of a cell, including `<cls>`.
    """
    lengths = np.diff(indptr)
    if lengths.max(initial=0) <= max_length - 1:
        return None
    cells = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((noise, cells))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - indptr[:-1][cells]
    return rank < max_length - 1

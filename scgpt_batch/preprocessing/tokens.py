"""A row's cells × genes -> the tokens of scGPT: preprocessed, binned, sampled, each cell starting with `<cls>`."""

from dataclasses import dataclass

import anndata as ad
import numpy as np
import scipy.sparse as sp

from scgpt_batch.errors import PreprocessError
from scgpt_batch.models.interface import CellTokens, Tokens
from scgpt_batch.models.scgpt import Vocabulary
from scgpt_batch.parameters import Parameters
from scgpt_batch.preprocessing.binning import COLLATOR_BINS, bin_matrix, cell_noise, gene_hash
from scgpt_batch.preprocessing.pipeline import binned_layer, check_columns, group_labels, on_sample_genes, preprocess
from scgpt_batch.preprocessing.sample_selection import Decisions

PAD_VALUE = -2  # of the published model: the value that <cls> gets


@dataclass(frozen=True)
class BinnedCells:
    """The cells of one row as scGPT sees them.

    Attributes
    ----------
    binned
        Bins, cells × G; each stored entry is a token, an explicit zero too.
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
        """Tokens of each cell, `<cls>` included: int64, (cells,)."""
        return np.diff(self.binned.indptr).astype(np.int64) + 1

    @property
    def expressed(self) -> np.ndarray:
        """Mask of the genes that at least one cell has a token of: (G,)."""
        return self.binned.getnnz(axis=0) > 0

    def tokens(self, cells: np.ndarray) -> tuple[Tokens, np.ndarray]:
        """Return the tokens of some cells, and each one's position among the row's genes, -1 for `<cls>`."""
        return tokenize(self.binned[cells], self.token_ids, cls_id=self.cls_id, cls_value=self.cls_value)


@dataclass(frozen=True)
class TokenizedRow:
    """What the engine needs of a row.

    Attributes
    ----------
    cell_ids, groups
        Names of the cells, and each cell's group (None without `group_by`).
    genes, token_ids, n_cells
        Names of the vocabulary's genes in the row, their token ids, and the number of cells that express each; all
        (G,).
    cells
        The cells' tokens; None in static mode.
    """

    cell_ids: np.ndarray
    groups: np.ndarray | None
    genes: np.ndarray
    token_ids: np.ndarray
    n_cells: np.ndarray
    cells: CellTokens | None


class ScgptTokenizer:
    """Turns rows into scGPT's tokens. Safe in several threads."""

    def __init__(self, vocabulary: Vocabulary, pad_value: float = PAD_VALUE) -> None:
        """Use the token ids of `vocabulary`; `<cls>` gets `pad_value`."""
        self.vocabulary = vocabulary
        self.pad_value = pad_value

    def tokenize(
        self, adata: ad.AnnData, parameters: Parameters, decisions: Decisions | None, *, whole_numbers: bool
    ) -> TokenizedRow:
        """Preprocess a row, keep the vocabulary's genes, and bin its cells where upstream does.

        Parameters
        ----------
        adata
            Cells × genes, X in CSR and float32. It is changed.
        decisions
            Of the sample that the row belongs to; None for a row that is a sample by itself.
        whole_numbers
            As for `preprocess`.

        Raises
        ------
        RowError
            No gene or cell survives, or a column or layer is missing.
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
            raise PreprocessError("no gene that survives preprocessing is in the vocabulary")
        counted = p.need_preprocess and is_static  # X of a view would be copied
        n_cells = adata.var["n_cells"].to_numpy() if counted else adata.X.getnnz(axis=0)
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
    """Bin all genes of a preprocessed row, as upstream's Preprocessor does, or those of the vocabulary alone."""
    if p.need_preprocess:
        matrix = bin_matrix(binned_layer(adata, p), names, p, p.binning)
        binned = sp.csr_matrix(matrix[:, columns])
    else:
        binned = sp.csr_matrix(adata.X[:, columns])
        if not p.data_is_binned:
            binned = bin_matrix(binned, names[columns], p, COLLATOR_BINS)
    return _sampled(binned, names[columns], p)


def _sampled(binned: sp.csr_matrix, names: np.ndarray, parameters: Parameters) -> sp.csr_matrix:
    """Keep `max_length` - 1 entries of each longer cell."""
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
    """Turn each cell's stored entries into tokens: `<cls>`, then the genes in the matrix's order.

    Parameters
    ----------
    matrix
        Binned values, cells × genes; an explicit zero is a token like any other.
    gene_ids
        Token id of each gene (column); none may be -1.

    Returns
    -------
    The tokens, and the column of each one's gene, int64, (T,); -1 for `<cls>`.
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
    """Choose max_length - 1 entries of each longer cell at random; None when no cell is longer.

    `noise` is (nnz,), from `cell_noise`; a cell keeps its smallest. Returns a mask over the entries.
    """
    lengths = np.diff(indptr)
    if lengths.max(initial=0) <= max_length - 1:
        return None
    cells = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((noise, cells))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - indptr[:-1][cells]
    return rank < max_length - 1

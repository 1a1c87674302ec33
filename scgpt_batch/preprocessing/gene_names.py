"""Matching of the genes of a row to the gene names of the vocabulary.

Files name genes by symbol or by Ensembl id, with versions, prefixes and repeated names. The names that match most genes
of the vocabulary are used. Columns of the same gene are summed, and features other than gene expression are dropped.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scgpt_batch.errors import PayloadError
from scgpt_batch.models.scgpt.vocabulary import SPECIAL_TOKENS, Vocabulary

SYMBOL_COLUMNS = (
    "gene_symbol", "gene_symbols", "feature_name", "gene_name", "gene_names", "gene_short_name", "symbol",
    "hgnc_symbol",
)  # fmt: skip
TYPE_COLUMNS = ("feature_types", "feature_type")
GENE_EXPRESSION = "gene expression"
# All other feature types of 10x Genomics. Elsewhere a column of this name can contain something else (CELLxGENE:
# "protein_coding", "lncRNA", …), so other values do not exclude a gene.
OTHER_TYPES = {
    "antibody capture", "antigen capture", "crispr guide capture", "multiplexing capture", "custom", "peaks", "vdj",
    "vdj-t", "vdj-b",
}  # fmt: skip

_ENSEMBL = r"ENS[A-Z]{0,6}G\d{11}"
_ENSEMBL_ID = re.compile(_ENSEMBL + r"(\.\d+)?")
# "GRCh38_CD3D" and "GRCh38______CD3D", as in Cell Ranger's files for several genomes
_GENOME = re.compile(r"(GRCh3[78]|hg19|hg38)_+")
# (pattern, group with the name of the gene) of names that identify one gene unambiguously
_SAFE_FORMS = (
    (re.compile(rf"({_ENSEMBL})\.\d+"), 1),
    (re.compile(rf"{_ENSEMBL}(\.\d+)?[|_](.+)"), 2),
    (re.compile(rf"(.+)[|_]{_ENSEMBL}(\.\d+)?"), 1),
)
# (pattern, description, what to do) of names that are not mapped, because the gene can only be guessed. Adjacent
# repeats in a pattern must not match the same characters: a long name in the input would then take quadratic time.
_UNSAFE_FORMS = (
    (
        re.compile(r"ENSG\d{11}(\.\d+)?"),
        "Ensembl ids",
        "add a var column of gene symbols (e.g. 'gene_symbol'; any of " + ", ".join(SYMBOL_COLUMNS) + ")",
    ),
    (re.compile(_ENSEMBL + r"(\.\d+)?"), "Ensembl ids of another species", "map them to human gene symbols first"),
    (
        re.compile(r"\d+"),
        "numbers (Entrez ids or row numbers)",
        "use gene symbols as var names, or add a var column of them (e.g. 'gene_symbol')",
    ),
    (
        re.compile(r"(mm9|mm10|mm39|GRCm38|GRCm39)_.+"),
        "mouse genes of a mixed-species file",
        "they stay unknown to the model",
    ),
    (
        re.compile(r"[A-Z][0-9-]*[a-z][\w.-]*"),
        "mouse gene symbols",
        "map them to human orthologs (symbols in capitals) first",
    ),
    (re.compile(r"(?=.*[a-z])[a-z0-9.-]+"), "gene symbols in lower case", "write human symbols in capitals"),
)


@dataclass(frozen=True)
class GeneSelection:
    """The genes of a row, and how its columns map to them.

    Attributes
    ----------
    names
        Unique gene names, in the order of the row's columns; G names.
    known
        Whether each name is in the vocabulary, (G,).
    place
        Position in `names` of each column of the row, -1 for dropped columns; None if columns and genes are the same.
    genes_in, genes_matched
        Number of columns with gene expression, and number of those whose name is in the vocabulary.
    warnings
        Names that were mapped, and columns that were summed or dropped.
    hint
        What most unknown names look like, and what to do about it; may be empty.
    """

    names: pd.Index
    known: np.ndarray
    place: np.ndarray | None
    genes_in: int
    genes_matched: int
    warnings: tuple[str, ...]
    hint: str

    def apply(self, matrix: sp.csr_matrix) -> sp.csr_matrix:
        """Return a matrix with the genes as columns, cells × G, from a matrix with the row's columns.

        Raises
        ------
        PayloadError
            The sum of columns of the same gene exceeds the range of float32.
        """
        if self.place is None:
            return matrix
        is_repeat = self._is_repeat[matrix.indices]
        # without repeated genes the entries stay sorted, as in the row
        found = self._selected(matrix, np.flatnonzero(~is_repeat & (self.place[matrix.indices] >= 0)))
        if is_repeat.any():
            repeats = self._selected(matrix, np.flatnonzero(is_repeat))
            with np.errstate(over="ignore"):
                repeats.sum_duplicates()
                found = found + repeats
        if not np.isfinite(found.data).all():
            gene = self.names[found.indices[np.argmin(np.isfinite(found.data))]]
            raise PayloadError(f"the sum of the columns of gene {gene!r} exceeds float32 (3.4e38); rescale X")
        return found

    @cached_property
    def _is_repeat(self) -> np.ndarray:
        """Whether each column of the row has the same gene as an earlier column."""
        assert self.place is not None
        return pd.Series(self.place).duplicated().to_numpy() & (self.place >= 0)

    def _selected(self, matrix: sp.csr_matrix, entries: np.ndarray) -> sp.csr_matrix:
        """Return a matrix with the genes as columns that contains only some stored entries."""
        assert self.place is not None
        starts = np.searchsorted(entries, matrix.indptr)
        columns = self.place[matrix.indices[entries]]
        return sp.csr_matrix((matrix.data[entries], columns, starts), (matrix.shape[0], len(self.names)))


def select_genes(var: pd.DataFrame, vocabulary: Vocabulary) -> GeneSelection:
    """Return the genes of a row, matched to the vocabulary.

    Names are compared unchanged, and then without surrounding blanks, versions of Ensembl ids, human genome prefixes
    and the Ensembl part of "ENSG…|SYMBOL". As in upstream, the index of var names the genes. Unknown Ensembl ids in it
    are replaced by symbols from the column of symbols that matches most genes. If the index matches less than half as
    many genes as that column, the column is used for all genes whose index is not in the vocabulary.

    Parameters
    ----------
    var
        Table of the row's genes.
    vocabulary
        Vocabulary of the model.

    Raises
    ------
    PayloadError
        var contains no gene expression features.
    """
    is_expression, type_warning = _gene_expression(var)
    part = var if is_expression.all() else var[is_expression]
    names, name_warning = _best_names(part, vocabulary)
    blank = np.fromiter((not name.strip() for name in names), bool, len(names))
    for i in np.flatnonzero(blank):
        names[i] = f"(unnamed {i})"
    codes, unique = pd.factorize(names)
    known_names = vocabulary.ids(unique) >= 0
    known = known_names[codes]
    repeated = len(names) - len(unique)
    hint, unsafe = _unsafe_form(names[~known], vocabulary)
    warnings = (
        type_warning,
        name_warning,
        hint if unsafe * 2 >= len(names) else None,
        f"{int(blank.sum())} genes have no name, so the model does not know them" if blank.any() else None,
        _repeats_warning(names, repeated) if repeated else None,
    )
    place = None
    if repeated or len(names) < len(var):
        place = np.full(len(var), -1, np.int32)
        place[is_expression] = codes
    return GeneSelection(
        names=pd.Index(unique, dtype=object),
        known=known_names,
        place=place,
        genes_in=len(names),
        genes_matched=int(known.sum()),
        warnings=tuple(filter(None, warnings)),
        hint=hint,
    )


def lookup_columns(columns: Sequence[str]) -> list[str]:
    """Return the columns of var that `select_genes` uses."""
    return [name for name in columns if str(name).lower() in (*SYMBOL_COLUMNS, *TYPE_COLUMNS)]


def _columns_named(var: pd.DataFrame, wanted: Sequence[str]) -> list[str]:
    """Return the columns of var with these names, ignoring case, in the order of `wanted`."""
    return [column for name in wanted for column in var.columns if str(column).lower() == name]


def _gene_expression(var: pd.DataFrame) -> tuple[np.ndarray, str | None]:
    """Return which features are gene expression, and a warning with the number of others by type."""
    for column in _columns_named(var, TYPE_COLUMNS):
        types = var[column].astype(object).where(var[column].notna(), "").astype(str).str.strip()
        plain = types.str.lower().to_numpy()
        is_10x = (plain == GENE_EXPRESSION).any()
        others = (plain != GENE_EXPRESSION) if is_10x else np.isin(plain, list(OTHER_TYPES))
        if not others.any():
            continue
        counts = ", ".join(f"{n} {kind or '(no type)'}" for kind, n in types[others].value_counts().items())
        if others.all():
            raise PayloadError(
                f"adata_var: no feature has the type 'Gene Expression' in column {column!r} (found: {counts}); export "
                "the gene expression features"
            )
        return ~others, f"{int(others.sum())} features are not gene expression and are dropped: {counts}"
    return np.ones(len(var), bool), None


def _best_names(var: pd.DataFrame, vocabulary: Vocabulary) -> tuple[np.ndarray, str | None]:
    """Return the best name of each gene, "" if it has none, and a warning if names other than the index are used.

    The returned array is new and may be modified.
    """
    index = var.index.to_numpy(dtype=object, copy=True)
    known = vocabulary.ids(index) >= 0
    if known.all():
        return index, None
    by_index = _cleaned(index, vocabulary)
    index_known = vocabulary.ids(by_index) >= 0
    column, by_column, column_known = _best_column(var, vocabulary)
    if column and index_known.sum() * 2 < column_known.sum():  # only the column matches most genes
        replaced = (column_known | ~known) & (by_column != "")
        counts = f"matches {int(column_known.sum())} of {len(index)} genes; var's index matches {int(known.sum())}"
        return np.where(replaced, by_column, index), f"gene names taken from var column {column!r} ({counts})"
    names, warnings = by_index, []
    if (shortened := np.flatnonzero(by_index != index)).size:
        first = shortened[0]
        counts = f"matches {int(index_known.sum())} of {len(index)} genes; var's index matches {int(known.sum())}"
        warnings.append(f"gene names shortened, e.g. {index[first]!r} to {names[first]!r} ({counts})")
    if column:
        is_id = np.fromiter((_ENSEMBL_ID.fullmatch(name) is not None for name in index), bool, len(index))
        if (replaced := is_id & ~index_known & column_known).any():
            names = np.where(replaced, by_column, names)
            warnings.append(f"{int(replaced.sum())} Ensembl ids named by var column {column!r}")
    return names, "; ".join(warnings) or None


def _best_column(var: pd.DataFrame, vocabulary: Vocabulary) -> tuple[str, np.ndarray, np.ndarray]:
    """Return the column of symbols that matches most genes, its names, and which of them are in the vocabulary."""
    best = ("", np.array([""] * len(var), dtype=object), np.zeros(len(var), bool))
    for column in _columns_named(var, SYMBOL_COLUMNS):
        names = _cleaned(_strings(var[column]), vocabulary)
        found = vocabulary.ids(names) >= 0
        if found.sum() > best[2].sum():
            best = (column, names, found)
    return best


def _strings(column: pd.Series) -> np.ndarray:
    values = column.astype(object)
    return values.where(column.notna(), "").astype(str).to_numpy(dtype=object)


def _cleaned(names: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Return names without prefixes, suffixes and blanks where only that makes them match the vocabulary."""
    cleaned = names.copy()
    for i in np.flatnonzero(vocabulary.ids(names) < 0):
        if (name := _clean(names[i])) in vocabulary and name not in SPECIAL_TOKENS:
            cleaned[i] = name
    return cleaned


def _clean(name: str) -> str:
    name = name.strip()
    if prefix := _GENOME.match(name):
        name = name[prefix.end() :]
    for pattern, kept in _SAFE_FORMS:
        if fits := pattern.fullmatch(name):
            return str(fits[kept])
    return name


def _unsafe_form(unknown: np.ndarray, vocabulary: Vocabulary) -> tuple[str, int]:
    """Return a message about the form of most unknown names, and their number; ("", 0) if most look like symbols."""
    for pattern, what, advice in _UNSAFE_FORMS:
        fits = [name for name in unknown if pattern.fullmatch(name)]
        # a name in another case counts as a symbol only if some of these names are symbols in capitals
        is_symbols = "symbols" in what
        if len(fits) * 2 > len(unknown) and not (is_symbols and not any(name.upper() in vocabulary for name in fits)):
            return f"{len(fits)} unknown gene names look like {what} (e.g. {fits[0]!r}): {advice}", len(fits)
    return "", 0


def _repeats_warning(names: np.ndarray, repeated: int) -> str:
    first = names[pd.Series(names).duplicated().to_numpy()][0]
    return f"{repeated} columns repeat the name of an earlier gene (first: {first!r}): their values are summed"

"""Which names the model knows a row's genes by, and which of its columns are one gene.

Files name genes by symbol or by Ensembl id, with versions, prefixes and repeats. Names are looked up by whichever way
matches most genes of the vocabulary; columns of one name are added up, and what is not gene expression is left out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scgpt_batch.errors import PayloadError
from scgpt_batch.models.scgpt import SPECIAL_TOKENS, Vocabulary

SYMBOL_COLUMNS = (
    "gene_symbol", "gene_symbols", "feature_name", "gene_name", "gene_names", "gene_short_name", "symbol",
    "hgnc_symbol",
)  # fmt: skip
TYPE_COLUMNS = ("feature_types", "feature_type")
GENE_EXPRESSION = "gene expression"
# The other types of 10x Genomics' feature tables. Elsewhere a column of this name may hold other things
# (CELLxGENE: "protein_coding", "lncRNA", …), which say nothing against a gene.
OTHER_TYPES = {
    "antibody capture", "antigen capture", "crispr guide capture", "multiplexing capture", "custom", "peaks", "vdj",
    "vdj-t", "vdj-b",
}  # fmt: skip

_ENSEMBL = r"ENS[A-Z]{0,6}G\d{11}"
_ENSEMBL_ID = re.compile(_ENSEMBL + r"(\.\d+)?")
# "GRCh38_CD3D" and "GRCh38______CD3D", as Cell Ranger writes files of several genomes
_GENOME = re.compile(r"(GRCh3[78]|hg19|hg38)_+")
# (pattern, what is kept of a name that fits): each stands for one gene without doubt
_SAFE_FORMS = (
    (re.compile(rf"({_ENSEMBL})\.\d+"), 1),
    (re.compile(rf"{_ENSEMBL}(\.\d+)?[|_](.+)"), 2),
    (re.compile(rf"(.+)[|_]{_ENSEMBL}(\.\d+)?"), 1),
)
# (pattern, what names of this form are, what to do): not mapped, because the gene meant is a guess. No two repeats of
# a pattern may match the same characters: names are foreign data, and a long one would take quadratic time.
_UNSAFE_FORMS = (
    (
        re.compile(r"ENSG\d{11}(\.\d+)?"),
        "Ensembl ids",
        "add a var column of gene symbols (e.g. 'gene_symbol'; any of " + ", ".join(SYMBOL_COLUMNS) + ")",
    ),
    (re.compile(_ENSEMBL + r"(\.\d+)?"), "Ensembl ids of another species", "map them to human gene symbols first"),
    (
        re.compile(r"\d+"),
        "numbers (Entrez ids, or row numbers)",
        "use gene symbols as var names, or add a var column of them (e.g. 'gene_symbol')",
    ),
    (re.compile(r"(mm9|mm10|mm39|GRCm38|GRCm39)_.+"), "mouse genes of a mixed-species file", "they stay unknown"),
    (
        re.compile(r"[A-Z][0-9-]*[a-z][\w.-]*"),
        "mouse gene symbols",
        "map them to their human orthologs (symbols in capitals) first",
    ),
    (re.compile(r"(?=.*[a-z])[a-z0-9.-]+"), "gene symbols in lower case", "write human symbols in capitals"),
)


@dataclass(frozen=True)
class GeneSelection:
    """A row's genes as the model sees them.

    Attributes
    ----------
    names
        Each name once, in the order of the row's columns: G names.
    known
        Which of them the vocabulary has, (G,).
    place
        Position in `names` of each of the row's columns, -1 for columns that are left out; None where the columns are
        the genes as they stand.
    genes_in, genes_matched
        Columns of gene expression, and how many of these carry a name of the vocabulary.
    warnings
        What was mapped, added up or left out.
    hint
        What the unknown names look like and what to do about it; "" where nothing is to be said.
    """

    names: pd.Index
    known: np.ndarray
    place: np.ndarray | None
    genes_in: int
    genes_matched: int
    warnings: tuple[str, ...]
    hint: str

    def apply(self, matrix: sp.csr_matrix) -> sp.csr_matrix:
        """Bring a matrix of the row's columns onto the genes, in its own type: cells × G, sorted.

        Raises
        ------
        PayloadError
            A sum is beyond the type's range.
        """
        if self.place is None:
            return matrix
        is_repeat = self._is_repeat[matrix.indices]
        # what is left without repeats is sorted, as the row's columns are
        found = self._taken(matrix, np.flatnonzero(~is_repeat & (self.place[matrix.indices] >= 0)))
        if is_repeat.any():
            repeats = self._taken(matrix, np.flatnonzero(is_repeat))
            with np.errstate(over="ignore"):
                repeats.sum_duplicates()
                found = found + repeats
        if not np.isfinite(found.data).all():
            gene = self.names[found.indices[np.argmin(np.isfinite(found.data))]]
            raise PayloadError(f"the columns of gene {gene!r} add up to more than float32 holds (3.4e38); rescale X")
        return found

    @cached_property
    def _is_repeat(self) -> np.ndarray:
        """Mask the row's columns whose gene has an earlier column."""
        assert self.place is not None
        return pd.Series(self.place).duplicated().to_numpy() & (self.place >= 0)

    def _taken(self, matrix: sp.csr_matrix, entries: np.ndarray) -> sp.csr_matrix:
        """Bring some stored entries onto the genes."""
        assert self.place is not None
        starts = np.searchsorted(entries, matrix.indptr)
        columns = self.place[matrix.indices[entries]]
        return sp.csr_matrix((matrix.data[entries], columns, starts), (matrix.shape[0], len(self.names)))


def select_genes(var: pd.DataFrame, vocabulary: Vocabulary) -> GeneSelection:
    """Name the genes of a row's var, leave out what is not gene expression and find columns of one gene.

    Names are compared as they stand and without surrounding blanks, versions of Ensembl ids, human genome prefixes or
    the Ensembl part of "ENSG…|SYMBOL". var's index names the genes, as upstream; unknown Ensembl ids in it get their
    symbol from the column of symbols that matches most genes. If the index matches less than half as many genes as
    that column, the column names all; a name in the index that the vocabulary has is kept.

    Raises
    ------
    PayloadError
        var holds no gene expression.
    """
    of_genes, type_warning = _gene_expression(var)
    part = var if of_genes.all() else var[of_genes]
    names, name_warning = _best_names(part, vocabulary)
    blank = np.fromiter((not name.strip() for name in names), bool, len(names))
    for i in np.flatnonzero(blank):
        names[i] = f"(unnamed {i})"
    codes, unique = pd.factorize(names)
    known_names = vocabulary.ids(unique) >= 0
    known = known_names[codes]
    added = len(names) - len(unique)
    hint, unsafe = _unsafe_form(names[~known], vocabulary)
    warnings = (
        type_warning,
        name_warning,
        hint if unsafe * 2 >= len(names) else None,
        f"{int(blank.sum())} genes have no name: unknown to the model" if blank.any() else None,
        _added_warning(names, added) if added else None,
    )
    place = None
    if added or len(names) < len(var):
        place = np.full(len(var), -1, np.int32)
        place[of_genes] = codes
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
    """Return those columns of var that `select_genes` looks at."""
    return [name for name in columns if str(name).lower() in (*SYMBOL_COLUMNS, *TYPE_COLUMNS)]


def _columns_named(var: pd.DataFrame, wanted: Sequence[str]) -> list[str]:
    """Return var's columns of these names, in any case, in the order of `wanted`."""
    return [column for name in wanted for column in var.columns if str(column).lower() == name]


def _gene_expression(var: pd.DataFrame) -> tuple[np.ndarray, str | None]:
    """Mask the columns of gene expression, and say how many others there are of each type."""
    for column in _columns_named(var, TYPE_COLUMNS):
        types = var[column].astype(object).where(var[column].notna(), "").astype(str).str.strip()
        plain = types.str.lower().to_numpy()
        is_10x = (plain == GENE_EXPRESSION).any()
        others = (plain != GENE_EXPRESSION) if is_10x else np.isin(plain, list(OTHER_TYPES))
        if not others.any():
            continue
        counts = ", ".join(f"{n} {kind or '(no type)'}" for kind, n in types[others].value_counts().items())
        if others.all():
            raise PayloadError(f"adata_var: no feature is of type 'Gene Expression' in {column!r}; it has {counts}")
        return ~others, f"{int(others.sum())} features are not gene expression and are left out: {counts}"
    return np.ones(len(var), bool), None


def _best_names(var: pd.DataFrame, vocabulary: Vocabulary) -> tuple[np.ndarray, str | None]:
    """Return each gene's name by the best candidate, "" where it has none, and a warning where that is not the index.

    The array is the caller's to change.
    """
    index = var.index.to_numpy(dtype=object, copy=True)
    known = vocabulary.ids(index) >= 0
    if known.all():
        return index, None
    by_index = _cleaned(index, vocabulary)
    index_known = vocabulary.ids(by_index) >= 0
    column, by_column, column_known = _best_column(var, vocabulary)
    if column and index_known.sum() * 2 < column_known.sum():  # most genes are known by the column alone
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
    """Return the column of symbols that matches most genes, its names, and which of them the vocabulary has."""
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
    """Strip unknown names of what stands around the name itself, where that makes them known."""
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
    """Describe the form that most unknown names have, and count them; ("", 0) where most look like symbols."""
    for pattern, what, advice in _UNSAFE_FORMS:
        fits = [name for name in unknown if pattern.fullmatch(name)]
        is_symbols = "symbols" in what  # in another case, which some other names may be in too
        if len(fits) * 2 > len(unknown) and not (is_symbols and not any(name.upper() in vocabulary for name in fits)):
            return f"{len(fits)} unknown gene names look like {what} (e.g. {fits[0]!r}): {advice}", len(fits)
    return "", 0


def _added_warning(names: np.ndarray, added: int) -> str:
    first = names[pd.Series(names).duplicated().to_numpy()][0]
    return f"{added} columns repeat the name of an earlier gene (first: {first!r}): their values are added up"

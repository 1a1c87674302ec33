"""The result of a row: its embeddings or its error, and the report for the ledger."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from scgpt_batch.errors import NonFiniteOutput, RowError, plain_line

_NAMES, _NUMBERS = re.compile(r"'[^']*'|\"[^\"]*\""), re.compile(r"\b\d[\d.,]*\d\b|\b\d\b")  # of the data in a warning
_PACKED_TYPES = {"float32_base64": "<f4", "float16_base64": "<f2"}  # number type of each packed `encoding`


@dataclass(frozen=True)
class RowReport:
    """Counts and warnings about a row, for the ledger."""

    cells: int = 0  # number of cells that were embedded or averaged
    genes_in: int = 0  # number of gene expression features
    genes_matched: int = 0  # number of those whose name is in the vocabulary
    coverage: float | None = None  # share of the row's counts in these genes
    warnings: tuple[str, ...] = ()  # each a single line of bounded length

    def __post_init__(self) -> None:
        # warnings quote names from the row
        object.__setattr__(self, "warnings", tuple(map(plain_line, self.warnings)))


@dataclass(frozen=True)
class RowResult:
    """The embeddings of one row, or its error.

    Attributes
    ----------
    genes, groups, n_cells, gene_embeddings
        Static and contextual mode, one entry for each gene (with `group_by`, for each group and gene): name, group,
        number of cells that express the gene, and vectors, float32, (genes, d).
    cell_ids, cell_embeddings
        Cell mode: names of the cells, and vectors of length 1, float32, (cells, d).
    report
        Counts and warnings.
    error
        The error, or None if the row has embeddings.
    """

    genes: Sequence[str] | None = None
    groups: Sequence[str] | None = None
    n_cells: np.ndarray | None = None
    gene_embeddings: np.ndarray | None = None
    cell_ids: Sequence[str] | None = None
    cell_embeddings: np.ndarray | None = None
    report: RowReport = field(default_factory=RowReport)
    error: RowError | None = None

    @property
    def embeddings(self) -> np.ndarray | None:
        """The vectors of genes or cells, depending on the mode."""
        return self.gene_embeddings if self.gene_embeddings is not None else self.cell_embeddings

    def base64(self, encoding: str) -> str:
        """Return the vectors as one base64 string, little-endian and row-major."""
        vectors = self.embeddings
        return "" if vectors is None else base64.b64encode(vectors.astype(_PACKED_TYPES[encoding]).tobytes()).decode()

    def checked(self) -> "RowResult":
        """Return this result, or a NonFiniteOutput error if a vector contains NaN or infinity."""
        vectors = self.embeddings
        if vectors is None or np.isfinite(vectors).all():
            return self
        bad = int(np.argmin(np.isfinite(vectors).all(axis=1)))
        names = self.genes if self.genes is not None else self.cell_ids
        name = names[bad]  # type: ignore[index]
        error = NonFiniteOutput(f"the embedding of {name!r} contains NaN or infinity; use dtype float32, or report it")
        return RowResult(report=self.report, error=error)


def unpack(text: str, encoding: str, d: int) -> np.ndarray:
    """Return the vectors in a string of `RowResult.base64`; read-only array of shape (genes or cells, d)."""
    return np.frombuffer(base64.b64decode(text), _PACKED_TYPES[encoding]).reshape(-1, d)


def warning_kind(warning: str) -> str:
    """Return the part of a warning that is the same in all rows: its first clause without names and numbers."""
    clause = re.split(r"[:;(]", _NAMES.sub("…", warning), maxsplit=1)[0]
    return _NUMBERS.sub("N", clause).strip()

"""What a row gets back: its embeddings or its error, and the report that the ledger keeps."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from scgpt_batch.errors import NonFiniteOutput, RowError, plain_line

_PACKED_TYPES = {"float32_base64": "<f4", "float16_base64": "<f2"}  # of the numbers in each packed `encoding`


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
class RowResult:
    """The embeddings of one row, or the error that stood in the way.

    Attributes
    ----------
    genes, groups, n_cells, gene_embeddings
        Static and contextual mode: one entry per gene (per group and gene with `group_by`); cells that carry the
        gene; float32, (genes, d).
    cell_ids, cell_embeddings
        Cell mode: the cells' names; float32, (cells, d), rows of norm 1.
    report, error
        What was seen of the row; the RowError, or None when well.
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
        """The answer's vectors, of genes or of cells, whichever the mode gives."""
        return self.gene_embeddings if self.gene_embeddings is not None else self.cell_embeddings

    def base64(self, encoding: str) -> str:
        """The vectors as one little-endian, row-major base64 string."""
        vectors = self.embeddings
        return "" if vectors is None else base64.b64encode(vectors.astype(_PACKED_TYPES[encoding]).tobytes()).decode()

    def checked(self) -> "RowResult":
        """Return the answer, or its error where a vector is not finite."""
        vectors = self.embeddings
        if vectors is None or np.isfinite(vectors).all():
            return self
        bad = int(np.argmin(np.isfinite(vectors).all(axis=1)))
        names = self.genes if self.genes is not None else self.cell_ids
        error = NonFiniteOutput(f"the embedding of {names[bad]!r} holds NaN or infinity")  # type: ignore[index]
        return RowResult(report=self.report, error=error)


def unpack(text: str, encoding: str, d: int) -> np.ndarray:
    """Read the vectors that `RowResult.base64` has packed: (genes or cells, d), read-only."""
    return np.frombuffer(base64.b64decode(text), _PACKED_TYPES[encoding]).reshape(-1, d)

"""From the device's output to a row's answer: cell vectors gathered, gene vectors averaged."""

import base64
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from scgpt_batch.errors import NonFiniteOutput, RowError
from scgpt_batch.model import send
from scgpt_batch.prepare import PreparedRow, RowReport
from scgpt_batch.preprocess import Tokens, tokenize

VECTORS_ON_DEVICE = 131_072  # that a row keeps there before they go to the host: 256 MB at d 512

_PACKED_TYPES = {"float32_base64": "<f4", "float16_base64": "<f2"}  # of the numbers in each packed `encoding`


@dataclass(frozen=True)
class Answer:
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

    def checked(self) -> "Answer":
        """Return the answer, or its error where a vector is not finite."""
        vectors = self.embeddings
        if vectors is None or np.isfinite(vectors).all():
            return self
        bad = int(np.argmin(np.isfinite(vectors).all(axis=1)))
        names = self.genes if self.genes is not None else self.cell_ids
        error = NonFiniteOutput(f"the embedding of {names[bad]!r} holds NaN or infinity")  # type: ignore[index]
        return Answer(report=self.report, error=error)


def unpacked(text: str, encoding: str, d: int) -> np.ndarray:
    """Read the vectors that `Answer.base64` has packed: (genes or cells, d), read-only."""
    return np.frombuffer(base64.b64decode(text), _PACKED_TYPES[encoding]).reshape(-1, d)


class ClsToken(NamedTuple):
    """What stands at the start of each cell."""

    id: int
    value: float


@dataclass(frozen=True)
class Piece:
    """Cells of one row that run together: `first` to `last` in the row's running order."""

    work: "RowWork"
    first: int
    last: int
    tokens: Tokens
    plan: "GeneSums | None" = None


class Answered:
    """A row that is answered without the device."""

    lengths = np.zeros(0, np.int64)
    left = 0

    def __init__(self, answer: Answer) -> None:
        """Keep the answer until it is the row's turn."""
        self._answer = answer

    def answer(self) -> Answer:
        """Return it."""
        return self._answer


class RowWork(ABC):
    """A row on its way over the device: its cells in running order, and what came back of them.

    Attributes
    ----------
    lengths
        Tokens of each cell, in running order.
    left
        Cells that did not come back yet.
    """

    def __init__(self, prepared: PreparedRow, cls: ClsToken, *, blocks: np.ndarray | None = None) -> None:
        """Run the cells by block, if given, and length: equal lengths side by side make the fastest attention."""
        assert prepared.binned is not None
        self.prepared = prepared
        self._cls = cls
        lengths = np.diff(prepared.binned.indptr) + 1
        self.cells = np.argsort(lengths, kind="stable") if blocks is None else np.lexsort((lengths, blocks))
        self.lengths = lengths[self.cells]
        self.left = len(self.cells)

    def run_end(self, first: int) -> int:
        """Return the end of the cells from `first` on that one piece may hold."""
        return len(self.cells)

    def piece(self, first: int, last: int) -> Piece:
        """Return the tokens of cells `first` to `last`."""
        block = self._block(first, last)
        return Piece(
            self, first, last, tokenize(block, self.prepared.token_ids, cls_id=self._cls.id, cls_value=self._cls.value)
        )

    @abstractmethod
    def add(self, piece: Piece, output: torch.Tensor) -> None:
        """Take the device's output for a piece; pieces come in running order."""

    @abstractmethod
    def answer(self) -> Answer:
        """Return the row's answer, once no cell is left."""

    def _block(self, first: int, last: int) -> sp.csr_matrix:
        assert self.prepared.binned is not None
        return self.prepared.binned[self.cells[first:last]]


class CellWork(RowWork):
    """Takes each cell's `<cls>` output, L2-normalised, as upstream's `embed_data` does."""

    def __init__(self, prepared: PreparedRow, cls: ClsToken, width: int) -> None:
        """Make room for the answer."""
        super().__init__(prepared, cls)
        self._vectors = np.empty((len(self.cells), width), np.float32)
        self._on_device: list[torch.Tensor] = []

    def add(self, piece: Piece, output: torch.Tensor) -> None:
        """Take the `<cls>` vectors of a piece, (cells, d); pieces come in running order."""
        self._on_device.append(output)
        self.left -= len(output)
        waiting = sum(map(len, self._on_device))
        if waiting >= VECTORS_ON_DEVICE or not self.left:
            self._vectors[self.cells[piece.last - waiting : piece.last]] = torch.cat(self._on_device).cpu().numpy()
            self._on_device.clear()

    def answer(self) -> Answer:
        """Return the cells' vectors."""
        vectors = self._vectors / np.linalg.norm(self._vectors, axis=1, keepdims=True)
        report, cell_ids = self.prepared.report, self.prepared.cell_ids.tolist()
        return Answer(cell_ids=cell_ids, cell_embeddings=vectors, report=report).checked()


@dataclass(frozen=True)
class GeneSums:
    """How a piece's output is summed by (group, gene): in one fixed order, so that runs agree bit by bit.

    Attributes
    ----------
    tokens
        Positions of the tokens to sum in the piece, those of one sum side by side, int64, (n,).
    counts
        How many tokens each sum takes, int64, (sums,).
    places
        Where each sum belongs in the buffer, ascending, int64, (sums,).
    """

    tokens: np.ndarray
    counts: np.ndarray
    places: np.ndarray


class ContextualWork(RowWork):
    """Averages the output of each gene over the cells (of each group) that carry it.

    Sums are float32 on the device. Groups are taken in turns of so many that the sums' buffer stays bounded.
    """

    def __init__(self, prepared: PreparedRow, cls: ClsToken, wanted: np.ndarray, *, sums: bool = False) -> None:
        """Average for the `wanted` genes, a mask over the row's; with `sums`, leave it at the sums."""
        self._leave_sums = sums
        groups = prepared.groups if prepared.groups is not None else np.array([""] * len(prepared.cell_ids), object)
        self._labels, self._group_of = np.unique(groups, return_inverse=True)
        self._columns = np.flatnonzero(wanted)  # of the answered genes
        self._column_place = np.cumsum(wanted) - 1
        self._wanted = wanted
        self._groups_a_turn = max(1, VECTORS_ON_DEVICE // max(1, len(self._columns)))
        super().__init__(prepared, cls, blocks=self._group_of // self._groups_a_turn)
        self._turn_ends = np.cumsum(np.bincount(self._group_of // self._groups_a_turn))
        self._sums: torch.Tensor | None = None
        self._n_cells = np.zeros(0, np.int64)
        self._means: list[np.ndarray] = []
        self._where: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []

    def run_end(self, first: int) -> int:
        """Return where the turn ends that `first` is in."""
        return int(self._turn_ends[np.searchsorted(self._turn_ends, first, side="right")])

    def piece(self, first: int, last: int) -> Piece:
        """Return the tokens of cells `first` to `last`, and how their output is summed."""
        block = self._block(first, last)
        tokens = tokenize(block, self.prepared.token_ids, cls_id=self._cls.id, cls_value=self._cls.value)
        cell = np.repeat(np.arange(last - first), np.diff(block.indptr))
        position = np.arange(block.nnz) + cell + 1  # behind the <cls> of its cell and of those before
        group = self._group_of[self.cells[first:last]] % self._groups_a_turn
        place = group[cell] * len(self._columns) + self._column_place[block.indices]
        kept = self._wanted[block.indices]
        position, place = position[kept], place[kept]
        order = np.argsort(place, kind="stable")
        places, counts = np.unique(place[order], return_counts=True)
        return Piece(self, first, last, tokens, GeneSums(position[order], counts, places))

    def add(self, piece: Piece, output: torch.Tensor) -> None:
        """Sum a piece's output, (T, d); pieces come in running order."""
        assert piece.plan is not None
        if self._sums is None:
            self._start_turn(output)
        tokens, counts, places = (
            send(torch.from_numpy(x), output.device) for x in (piece.plan.tokens, piece.plan.counts, piece.plan.places)
        )
        sums = torch.segment_reduce(output[tokens], "sum", lengths=counts, axis=0, unsafe=True)
        self._sums.index_add_(0, places, sums)  # type: ignore[union-attr]
        self._n_cells[piece.plan.places] += piece.plan.counts
        self.left -= piece.last - piece.first
        if piece.last in self._turn_ends:
            self._end_turn(int(np.searchsorted(self._turn_ends, piece.last)))

    def _start_turn(self, like: torch.Tensor) -> None:
        n_sums = min(self._groups_a_turn, len(self._labels)) * len(self._columns)
        self._sums = torch.zeros(n_sums, like.shape[1], device=like.device)
        self._n_cells = np.zeros(n_sums, np.int64)

    def _end_turn(self, turn: int) -> None:
        assert self._sums is not None
        where = np.flatnonzero(self._n_cells)
        sums = self._sums[torch.from_numpy(where).to(self._sums.device)].cpu().numpy()
        self._means.append(sums if self._leave_sums else sums / self._n_cells[where, None].astype(np.float32))
        self._where.append(where + turn * self._groups_a_turn * len(self._columns))
        self._counts.append(self._n_cells[where])
        self._sums = None

    def answer(self) -> Answer:
        """Return the means, by group, then in the row's order of genes."""
        if not len(self.cells):
            return self._answer_without_cells()
        where, columns = np.concatenate(self._where), self._columns
        grouped = self.prepared.groups is not None
        return Answer(
            genes=self.prepared.genes[columns[where % len(columns)]].tolist(),
            groups=self._labels[where // len(columns)].tolist() if grouped else None,
            n_cells=np.concatenate(self._counts).astype(np.int32),
            gene_embeddings=np.concatenate(self._means),
            report=self.prepared.report,
        ).checked()

    def _answer_without_cells(self) -> Answer:
        """No cell of the row reached the cell filter of its sample."""
        nothing = np.zeros((0, 0), np.float32)
        groups: list[str] | None = [] if self.prepared.groups is not None else None
        return Answer([], groups, np.zeros(0, np.int32), nothing, report=self.prepared.report)

"""From the device's output to a row's answer: cell vectors gathered, gene vectors averaged."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from scgpt_batch.inference.results import RowResult
from scgpt_batch.inference.row_reader import PreparedRow
from scgpt_batch.models.attention import to_device
from scgpt_batch.preprocessing.tokens import Tokens

VECTORS_ON_DEVICE = 131_072  # that a row keeps there before they go to the host: 256 MB at d 512


@dataclass(frozen=True)
class Piece:
    """Cells of one row that run together: `first` to `last` in the row's running order."""

    work: "RowAccumulator"
    first: int
    last: int
    tokens: Tokens
    plan: "GeneSums | None" = None


class FinishedRow:
    """A row that is answered without the device."""

    lengths = np.zeros(0, np.int64)
    remaining = 0

    def __init__(self, answer: RowResult) -> None:
        """Keep the answer until it is the row's turn."""
        self._answer = answer

    def answer(self) -> RowResult:
        """Return it."""
        return self._answer


class RowAccumulator(ABC):
    """A row on its way over the device: its cells in running order, and what came back of them.

    Attributes
    ----------
    lengths
        Tokens of each cell, in running order.
    remaining
        Cells whose output is still missing.
    """

    def __init__(self, prepared: PreparedRow, *, blocks: np.ndarray | None = None) -> None:
        """Run the cells by block, if given, and length: equal lengths side by side make the fastest attention."""
        assert prepared.cells is not None
        self.prepared = prepared
        self._tokens = prepared.cells.tokens
        lengths = prepared.cells.lengths
        self.cells = np.argsort(lengths, kind="stable") if blocks is None else np.lexsort((lengths, blocks))
        self.lengths = lengths[self.cells]
        self.remaining = len(self.cells)

    def run_end(self, first: int) -> int:
        """Return the end of the cells from `first` on that one piece may hold."""
        return len(self.cells)

    def piece(self, first: int, last: int) -> Piece:
        """Return the tokens of cells `first` to `last`."""
        tokens, _ = self._tokens(self.cells[first:last])
        return Piece(self, first, last, tokens)

    @abstractmethod
    def add(self, piece: Piece, output: torch.Tensor) -> None:
        """Take the device's output for a piece; pieces come in running order."""

    @abstractmethod
    def answer(self) -> RowResult:
        """Return the row's answer, once no cell is left."""


class CellAccumulator(RowAccumulator):
    """Takes each cell's `<cls>` output, L2-normalised, as upstream's `embed_data` does."""

    def __init__(self, prepared: PreparedRow, width: int) -> None:
        """Make room for the answer."""
        super().__init__(prepared)
        self._vectors = np.empty((len(self.cells), width), np.float32)
        self._on_device: list[torch.Tensor] = []

    def add(self, piece: Piece, output: torch.Tensor) -> None:
        """Take the `<cls>` vectors of a piece, (cells, d); pieces come in running order."""
        self._on_device.append(output)
        self.remaining -= len(output)
        waiting = sum(map(len, self._on_device))
        if waiting >= VECTORS_ON_DEVICE or not self.remaining:
            self._vectors[self.cells[piece.last - waiting : piece.last]] = torch.cat(self._on_device).cpu().numpy()
            self._on_device.clear()

    def answer(self) -> RowResult:
        """Return the cells' vectors."""
        vectors = self._vectors / np.linalg.norm(self._vectors, axis=1, keepdims=True)
        report, cell_ids = self.prepared.report, self.prepared.cell_ids.tolist()
        return RowResult(cell_ids=cell_ids, cell_embeddings=vectors, report=report).checked()


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


class GeneAccumulator(RowAccumulator):
    """Averages the output of each gene over the cells (of each group) that carry it.

    Sums are float32 on the device. Groups are taken in turns of so many that the sums' buffer stays bounded.
    """

    def __init__(self, prepared: PreparedRow, wanted: np.ndarray, *, sums: bool = False) -> None:
        """Average for the `wanted` genes, a mask over the row's; with `sums`, leave it at the sums."""
        self._leave_sums = sums
        groups = prepared.groups if prepared.groups is not None else np.array([""] * len(prepared.cell_ids), object)
        self._labels, self._group_of = np.unique(groups, return_inverse=True)
        self._columns = np.flatnonzero(wanted)  # of the answered genes
        self._column_place = np.cumsum(wanted) - 1
        self._wanted = wanted
        self._groups_a_turn = max(1, VECTORS_ON_DEVICE // max(1, len(self._columns)))
        super().__init__(prepared, blocks=self._group_of // self._groups_a_turn)
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
        tokens, columns = self._tokens(self.cells[first:last])
        position = np.flatnonzero((columns >= 0) & self._wanted[columns])  # special tokens have -1
        group = self._group_of[self.cells[first:last]] % self._groups_a_turn
        of_token = np.repeat(group, tokens.lengths)[position]
        place = of_token * len(self._columns) + self._column_place[columns[position]]
        order = np.argsort(place, kind="stable")
        places, counts = np.unique(place[order], return_counts=True)
        return Piece(self, first, last, tokens, GeneSums(position[order], counts, places))

    def add(self, piece: Piece, output: torch.Tensor) -> None:
        """Sum a piece's output, (T, d); pieces come in running order."""
        assert piece.plan is not None
        if self._sums is None:
            self._start_turn(output)
        tokens, counts, places = (
            to_device(torch.from_numpy(x), output.device)
            for x in (piece.plan.tokens, piece.plan.counts, piece.plan.places)
        )
        sums = torch.segment_reduce(output[tokens], "sum", lengths=counts, axis=0, unsafe=True)
        self._sums.index_add_(0, places, sums)  # type: ignore[union-attr]
        self._n_cells[piece.plan.places] += piece.plan.counts
        self.remaining -= piece.last - piece.first
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

    def answer(self) -> RowResult:
        """Return the means, by group, then in the row's order of genes."""
        if not len(self.cells):
            return self._answer_without_cells()
        where, columns = np.concatenate(self._where), self._columns
        grouped = self.prepared.groups is not None
        return RowResult(
            genes=self.prepared.genes[columns[where % len(columns)]].tolist(),
            groups=self._labels[where // len(columns)].tolist() if grouped else None,
            n_cells=np.concatenate(self._counts).astype(np.int32),
            gene_embeddings=np.concatenate(self._means),
            report=self.prepared.report,
        ).checked()

    def _answer_without_cells(self) -> RowResult:
        """No cell of the row reached the cell filter of its sample."""
        nothing = np.zeros((0, 0), np.float32)
        groups: list[str] | None = [] if self.prepared.groups is not None else None
        return RowResult([], groups, np.zeros(0, np.int32), nothing, report=self.prepared.report)

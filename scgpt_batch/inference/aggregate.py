"""Conversion of model output into the result of a row: vectors of cells, or averaged vectors of genes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from scgpt_batch.inference.results import RowResult
from scgpt_batch.inference.row_reader import PreparedRow
from scgpt_batch.models.attention import to_device
from scgpt_batch.preprocessing.tokens import Tokens

VECTORS_ON_DEVICE = 131_072  # vectors that a row keeps on the device before they are copied: 256 MB at d 512


@dataclass(frozen=True)
class Piece:
    """Cells of one row that are computed together.

    Attributes
    ----------
    row
        The row.
    first, last
        Range of the cells in the row's order of computation; `last` is exclusive.
    tokens
        Tokens of the cells.
    plan
        How the output is summed; None in cell mode.
    """

    row: "RowAccumulator"
    first: int
    last: int
    tokens: Tokens
    plan: "GeneSums | None" = None


class FinishedRow:
    """A row whose result is known without the device. It waits for the results of earlier rows."""

    lengths = np.zeros(0, np.int64)
    remaining = 0

    def __init__(self, result: RowResult) -> None:
        self._result = result

    def result(self) -> RowResult:
        """Return the result."""
        return self._result


class RowAccumulator(ABC):
    """A row in progress: the order in which its cells are computed, and the output collected so far.

    Attributes
    ----------
    cells
        Positions of the cells in the row, in the order of computation.
    lengths
        Number of tokens of each cell, in the order of computation.
    remaining
        Number of cells without output.
    """

    def __init__(self, prepared: PreparedRow, *, blocks: np.ndarray | None = None) -> None:
        # ordered by block, if given, then by length, because attention is fastest for consecutive equal lengths
        assert prepared.cells is not None
        self.prepared = prepared
        self._tokens = prepared.cells.tokens
        lengths = prepared.cells.lengths
        self.cells = np.argsort(lengths, kind="stable") if blocks is None else np.lexsort((lengths, blocks))
        self.lengths = lengths[self.cells]
        self.remaining = len(self.cells)

    def run_end(self, first: int) -> int:
        """Return the largest possible `last` of a piece that starts at `first`."""
        return len(self.cells)

    def piece(self, first: int, last: int) -> Piece:
        """Return the piece with cells `first` to `last`."""
        tokens, _ = self._tokens(self.cells[first:last])
        return Piece(self, first, last, tokens)

    @abstractmethod
    def add(self, piece: Piece, output: torch.Tensor) -> None:
        """Add the output of the model for a piece; pieces are added in order."""

    @abstractmethod
    def result(self) -> RowResult:
        """Return the result of the row. Call it when no cell remains."""


class CellAccumulator(RowAccumulator):
    """Collects the `<cls>` vectors of the cells, normalised to length 1 as in upstream's `embed_data`."""

    def __init__(self, prepared: PreparedRow, width: int) -> None:
        super().__init__(prepared)
        self._vectors = np.empty((len(self.cells), width), np.float32)
        self._on_device: list[torch.Tensor] = []

    def add(self, piece: Piece, output: torch.Tensor) -> None:
        """Add the `<cls>` vectors of a piece, (cells, d); pieces are added in order."""
        self._on_device.append(output)
        self.remaining -= len(output)
        waiting = sum(map(len, self._on_device))
        if waiting >= VECTORS_ON_DEVICE or not self.remaining:
            self._vectors[self.cells[piece.last - waiting : piece.last]] = torch.cat(self._on_device).cpu().numpy()
            self._on_device.clear()

    def result(self) -> RowResult:
        """Return the vectors of the cells, in the order of the row."""
        vectors = self._vectors / np.linalg.norm(self._vectors, axis=1, keepdims=True)
        report, cell_ids = self.prepared.report, self.prepared.cell_ids.tolist()
        return RowResult(cell_ids=cell_ids, cell_embeddings=vectors, report=report).checked()


@dataclass(frozen=True)
class GeneSums:
    """How the output of a piece is summed by group and gene. The order is fixed, so results are bit-reproducible.

    Attributes
    ----------
    tokens
        Positions of the tokens in the piece, ordered by sum, int64, (n,).
    counts
        Number of tokens of each sum, int64, (sums,).
    places
        Position of each sum in the buffer, ascending, int64, (sums,).
    """

    tokens: np.ndarray
    counts: np.ndarray
    places: np.ndarray


class GeneAccumulator(RowAccumulator):
    """Averages the output of each gene over the cells (of each group) that express it.

    Sums are float32 on the device. To limit the size of the buffer, groups are computed in blocks.

    Parameters
    ----------
    prepared
        The row.
    wanted
        Which genes of the row to average, bool, (genes,).
    sums
        Return sums instead of means.
    """

    def __init__(self, prepared: PreparedRow, wanted: np.ndarray, *, sums: bool = False) -> None:
        self._return_sums = sums
        groups = prepared.groups if prepared.groups is not None else np.array([""] * len(prepared.cell_ids), object)
        self._labels, self._group_of = np.unique(groups, return_inverse=True)
        self._columns = np.flatnonzero(wanted)  # positions of the averaged genes in the row
        self._column_place = np.cumsum(wanted) - 1
        self._wanted = wanted
        self._groups_per_block = max(1, VECTORS_ON_DEVICE // max(1, len(self._columns)))
        super().__init__(prepared, blocks=self._group_of // self._groups_per_block)
        self._block_ends = np.cumsum(np.bincount(self._group_of // self._groups_per_block))
        self._sums: torch.Tensor | None = None
        self._n_cells = np.zeros(0, np.int64)
        self._means: list[np.ndarray] = []
        self._where: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []

    def run_end(self, first: int) -> int:
        """Return the end of the block that contains `first`."""
        return int(self._block_ends[np.searchsorted(self._block_ends, first, side="right")])

    def piece(self, first: int, last: int) -> Piece:
        """Return the piece with cells `first` to `last`, and how its output is summed."""
        tokens, columns = self._tokens(self.cells[first:last])
        position = np.flatnonzero((columns >= 0) & self._wanted[columns])  # special tokens have -1
        group = self._group_of[self.cells[first:last]] % self._groups_per_block
        of_token = np.repeat(group, tokens.lengths)[position]
        place = of_token * len(self._columns) + self._column_place[columns[position]]
        order = np.argsort(place, kind="stable")
        places, counts = np.unique(place[order], return_counts=True)
        return Piece(self, first, last, tokens, GeneSums(position[order], counts, places))

    def add(self, piece: Piece, output: torch.Tensor) -> None:
        """Add the output of a piece, (T, d), to the sums; pieces are added in order."""
        assert piece.plan is not None
        if self._sums is None:
            self._start_block(output)
        tokens, counts, places = (
            to_device(torch.from_numpy(x), output.device)
            for x in (piece.plan.tokens, piece.plan.counts, piece.plan.places)
        )
        sums = torch.segment_reduce(output[tokens], "sum", lengths=counts, axis=0, unsafe=True)
        self._sums.index_add_(0, places, sums)  # type: ignore[union-attr]
        self._n_cells[piece.plan.places] += piece.plan.counts
        self.remaining -= piece.last - piece.first
        if piece.last in self._block_ends:
            self._end_block(int(np.searchsorted(self._block_ends, piece.last)))

    def _start_block(self, like: torch.Tensor) -> None:
        n_sums = min(self._groups_per_block, len(self._labels)) * len(self._columns)
        self._sums = torch.zeros(n_sums, like.shape[1], device=like.device)
        self._n_cells = np.zeros(n_sums, np.int64)

    def _end_block(self, block: int) -> None:
        assert self._sums is not None
        where = np.flatnonzero(self._n_cells)
        sums = self._sums[torch.from_numpy(where).to(self._sums.device)].cpu().numpy()
        self._means.append(sums if self._return_sums else sums / self._n_cells[where, None].astype(np.float32))
        self._where.append(where + block * self._groups_per_block * len(self._columns))
        self._counts.append(self._n_cells[where])
        self._sums = None

    def result(self) -> RowResult:
        """Return the means (or sums), ordered by group, then by gene in the order of the row."""
        if not len(self.cells):
            return self._result_without_cells()
        where, columns = np.concatenate(self._where), self._columns
        grouped = self.prepared.groups is not None
        return RowResult(
            genes=self.prepared.genes[columns[where % len(columns)]].tolist(),
            groups=self._labels[where // len(columns)].tolist() if grouped else None,
            n_cells=np.concatenate(self._counts).astype(np.int32),
            gene_embeddings=np.concatenate(self._means),
            report=self.prepared.report,
        ).checked()

    def _result_without_cells(self) -> RowResult:
        """Return an empty result: no cell of the row passes the cell filter of its sample."""
        empty = np.zeros((0, 0), np.float32)
        groups: list[str] | None = [] if self.prepared.groups is not None else None
        return RowResult([], groups, np.zeros(0, np.int32), empty, report=self.prepared.report)

"""Division of rows into batches for the device, prepared in a separate thread while the device computes.

A batch contains cells of one or several rows, up to a maximum number of tokens.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numba
import numpy as np

from scgpt_batch.inference.aggregate import FinishedRow, Piece, RowAccumulator
from scgpt_batch.preprocessing.tokens import Tokens

T = TypeVar("T")

AHEAD = 2  # number of batches prepared in advance while one is on the device


@dataclass
class Batch:
    """Pieces that are computed together.

    Attributes
    ----------
    rows
        The rows that begin in this batch, in order.
    pieces
        The cells of this batch, in order.
    """

    rows: list[RowAccumulator | FinishedRow] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all pieces."""
        return sum(len(piece.tokens.genes) for piece in self.pieces)

    @property
    def tokens(self) -> Tokens:
        """The tokens of all pieces, concatenated."""
        parts = [piece.tokens for piece in self.pieces]
        return Tokens(*(np.concatenate([getattr(part, name) for part in parts]) for name in Tokens.__annotations__))


def batches(rows: Iterable[RowAccumulator | FinishedRow], budget: Callable[[], int]) -> Iterator[Batch]:
    """Yield batches of at most `budget()` tokens, but at least one cell, each as soon as it is full.

    A row that needs no device is yielded immediately, unless cells of earlier rows are still waiting.
    """
    batch = Batch()
    for row in rows:
        batch.rows.append(row)
        first = 0
        while isinstance(row, RowAccumulator) and first < len(row.lengths):
            last = first + _cells_that_fit(row, first, budget() - batch.n_tokens)
            if last == first and batch.pieces:
                yield batch
                batch = Batch()
                continue
            last = max(last, first + 1)
            batch.pieces.append(row.piece(first, last))
            first = last
        if not batch.pieces:
            yield batch
            batch = Batch()
    if batch.rows or batch.pieces:
        yield batch


def _cells_that_fit(row: RowAccumulator, first: int, tokens: int) -> int:
    """Return how many cells from `first` on can form a piece of at most `tokens` tokens."""
    ends = np.cumsum(row.lengths[first : row.run_end(first)])
    return int(np.searchsorted(ends, tokens, side="right"))


def prefetched(items: Iterable[T]) -> Generator[T, None, None]:
    """Yield items that a thread computes in advance, at most AHEAD of them.

    Exceptions of `items` are raised here. Closing the generator waits for the item in progress and ends the thread.
    numba's number of threads is a property of each thread; the new thread inherits the caller's.
    """
    source, end = iter(items), object()
    cores = numba.get_num_threads()
    pool = ThreadPoolExecutor(1, "scgpt-prepare", initializer=numba.set_num_threads, initargs=(cores,))
    try:
        ahead = deque(pool.submit(next, source, end) for _ in range(AHEAD))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, source, end))
            yield item  # type: ignore[misc]  # not `end`
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

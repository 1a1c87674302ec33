"""Rows -> batches for the device, made in a thread of their own while the device works.

A batch holds cells of one or several rows, as many tokens as the budget allows.
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

AHEAD = 2  # batches that are ready or in the making while one is on the device


@dataclass
class Batch:
    """Pieces that run together, and the rows that came with them, in order."""

    works: list[RowAccumulator | FinishedRow] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        """Tokens of all pieces."""
        return sum(len(piece.tokens.genes) for piece in self.pieces)

    @property
    def tokens(self) -> Tokens:
        """The pieces' tokens, packed one after the other."""
        parts = [piece.tokens for piece in self.pieces]
        return Tokens(*(np.concatenate([getattr(part, name) for part in parts]) for name in Tokens.__annotations__))


def batches(works: Iterable[RowAccumulator | FinishedRow], budget: Callable[[], int]) -> Iterator[Batch]:
    """Yield batches of at most `budget()` tokens, but of one cell at least, each as soon as it is full.

    A row that needs no device comes at once when no cell waits before it.
    """
    batch = Batch()
    for work in works:
        batch.works.append(work)
        first = 0
        while isinstance(work, RowAccumulator) and first < len(work.lengths):
            last = first + _that_fit(work, first, budget() - batch.n_tokens)
            if last == first and batch.pieces:
                yield batch
                batch = Batch()
                continue
            last = max(last, first + 1)
            batch.pieces.append(work.piece(first, last))
            first = last
        if not batch.pieces:
            yield batch
            batch = Batch()
    if batch.works or batch.pieces:
        yield batch


def _that_fit(work: RowAccumulator, first: int, room: int) -> int:
    """How many of the work's cells from `first` on may go together and have no more than `room` tokens."""
    ends = np.cumsum(work.lengths[first : work.run_end(first)])
    return int(np.searchsorted(ends, room, side="right"))


def prefetched(items: Iterable[T]) -> Generator[T, None, None]:
    """Draw items in a thread, at most AHEAD before they are asked for.

    What `items` raises is raised here, in its place. Closing this generator waits for the item in the making and ends
    the thread. The thread keeps to the caller's share of cores, which numba remembers for each thread apart.
    """
    source, end = iter(items), object()
    cores = numba.get_num_threads()
    pool = ThreadPoolExecutor(1, "scgpt-prepare", initializer=numba.set_num_threads, initargs=(cores,))
    try:
        ahead = deque(pool.submit(next, source, end) for _ in range(AHEAD))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, source, end))
            yield item  # type: ignore[misc]  # it is no `end`
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

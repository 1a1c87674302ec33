"""Embeds the rows of concurrent requests together: one large batch on the device instead of many small ones."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from itertools import islice
from typing import Any

from scgpt_batch.inference.engine import RowResult
from scgpt_batch.parameters import Parameters

logger = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Any]]
Waiting = tuple[Rows, asyncio.Future[list[RowResult]]]  # of one request
EmbedRows = Callable[[Rows, Parameters, Callable[[], bool]], list[RowResult]]


class MicroBatcher:
    """Collects rows with equal parameters for a few milliseconds, or while the device is busy.

    A row's result depends on the row alone, so batching affects latency, not results.
    """

    def __init__(
        self, embed_rows: EmbedRows, executor: Executor, *, wait_seconds: float, on_batch: Callable[[int], None]
    ) -> None:
        """`on_batch` is called with the number of requests in each call of `embed_rows`.

        `embed_rows` is called with a function that returns whether any of these requests still waits; if none does, it
        may stop early.
        """
        self._embed_rows, self._executor = embed_rows, executor
        self._wait_seconds, self._on_batch = wait_seconds, on_batch
        self._waiting: dict[Parameters, list[Waiting]] = defaultdict(list)
        self._device = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def answers(self, rows: Rows, parameters: Parameters) -> list[RowResult]:
        """Return the results of rows, in order, batched with other requests; raises what `embed_rows` raises."""
        answer: asyncio.Future[list[RowResult]] = asyncio.get_running_loop().create_future()
        self._waiting[parameters].append((rows, answer))
        if len(self._waiting[parameters]) == 1:
            task = asyncio.create_task(self._collect(parameters))
            self._tasks.add(task)  # the event loop keeps only weak references to tasks
            task.add_done_callback(self._tasks.discard)
        return await answer

    async def _collect(self, parameters: Parameters) -> None:
        await asyncio.sleep(self._wait_seconds)
        async with self._device:
            waiting = [(rows, answer) for rows, answer in self._waiting.pop(parameters) if not answer.done()]
            if waiting:
                self._on_batch(len(waiting))
                await self._answer(waiting, parameters)

    async def _answer(
        self, waiting: list[tuple[Rows, asyncio.Future[list[RowResult]]]], parameters: Parameters
    ) -> None:
        loop = asyncio.get_running_loop()
        together = [row for rows, _ in waiting for row in rows]

        def wanted() -> bool:
            return not all(answer.done() for _, answer in waiting)

        try:
            found = iter(await loop.run_in_executor(self._executor, self._embed_rows, together, parameters, wanted))
        except Exception as exc:  # every error is passed to its request, which would wait for ever otherwise
            if len(waiting) == 1:
                _settle(waiting[0][1], exc)
                return
            logger.warning("a batch of %d requests failed (%s); trying each request alone", len(waiting), exc)
            for one in waiting:
                await self._answer([one], parameters)
            return
        for rows, answer in waiting:
            _settle(answer, list(islice(found, len(rows))))


def _settle(answer: asyncio.Future[list[RowResult]], result: list[RowResult] | Exception) -> None:
    if answer.done():  # its request has timed out
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)

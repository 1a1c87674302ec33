"""Answer the rows of concurrent requests together, so that the device runs one large batch and not many small ones."""

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
EmbedRows = Callable[[Rows, Parameters, Callable[[], bool]], list[RowResult]]


class MicroBatcher:
    """Collects rows with equal parameters for a few milliseconds, or for as long as the device is busy.

    A row's answer depends on the row alone, so who it is batched with changes nothing but the wait.
    """

    def __init__(
        self, embed_rows: EmbedRows, executor: Executor, *, wait_seconds: float, on_batch: Callable[[int], None]
    ) -> None:
        """`on_batch` gets the number of requests in each call of `embed_rows`.

        `embed_rows` gets a function that tells whether any of these requests still waits; its answers may be cut short
        when none does.
        """
        self._embed_rows, self._executor = embed_rows, executor
        self._wait_seconds, self._on_batch = wait_seconds, on_batch
        self._waiting: dict[Parameters, list[tuple[Rows, asyncio.Future[list[RowResult]]]]] = defaultdict(list)
        self._device = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def answers(self, rows: Rows, parameters: Parameters) -> list[RowResult]:
        """Answer rows in order, together with what others ask meanwhile; raises what `embed_rows` raises."""
        answer: asyncio.Future[list[RowResult]] = asyncio.get_running_loop().create_future()
        self._waiting[parameters].append((rows, answer))
        if len(self._waiting[parameters]) == 1:
            task = asyncio.create_task(self._collect(parameters))
            self._tasks.add(task)  # the loop itself keeps no task alive
            task.add_done_callback(self._tasks.discard)
        return await answer

    async def _collect(self, parameters: Parameters) -> None:
        await asyncio.sleep(self._wait_seconds)
        async with self._device:
            asked = [(rows, answer) for rows, answer in self._waiting.pop(parameters) if not answer.done()]
            if asked:
                self._on_batch(len(asked))
                await self._answer(asked, parameters)

    async def _answer(self, asked: list[tuple[Rows, asyncio.Future[list[RowResult]]]], parameters: Parameters) -> None:
        loop = asyncio.get_running_loop()
        together = [row for rows, _ in asked for row in rows]

        def wanted() -> bool:
            return not all(answer.done() for _, answer in asked)

        try:
            found = iter(await loop.run_in_executor(self._executor, self._embed_rows, together, parameters, wanted))
        except Exception as exc:  # whatever it is goes to the request that asked, which would wait for ever otherwise
            if len(asked) == 1:
                _settle(asked[0][1], exc)
                return
            logger.warning("a batch of %d requests failed (%s); each is tried alone", len(asked), exc)
            for one in asked:
                await self._answer([one], parameters)
            return
        for rows, answer in asked:
            _settle(answer, list(islice(found, len(rows))))


def _settle(answer: asyncio.Future[list[RowResult]], result: list[RowResult] | Exception) -> None:
    if answer.done():  # its request ran out of time
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)

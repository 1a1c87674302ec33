"""One row at a time in a process of its own: what a wave falls back to after it lost a Python worker.

A row that crashes native code, exhausts memory or never ends takes only that process with it and becomes a failed
answer; the next row gets a new process.
"""

import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from scgpt_batch.answers import Answer
from scgpt_batch.errors import RowError, Timeout, WorkerCrash
from scgpt_batch.prepare import RowReport

Row = dict[str, Any]
Work = Callable[[], Callable[[Row], Answer]]  # loads the model, then answers rows

START_SECONDS = 600.0  # a new process imports the package and loads the model

# Never forked from the worker itself: threads and CUDA do not survive that. On Linux the libraries, seconds to import,
# are imported once, by a server that does nothing else and is forked for each process; macOS's don't survive even that.
_LINUX = sys.platform == "linux"
_CONTEXT = multiprocessing.get_context("forkserver") if _LINUX else multiprocessing.get_context("spawn")
_CONTEXT.set_forkserver_preload(["scgpt_batch.embedder"])


def answers_alone(rows: Iterable[Row], work: Work, seconds: float) -> Iterator[Answer]:
    """Answer rows one by one; each has `seconds`, and costs no more than itself.

    Parameters
    ----------
    work
        A picklable function, called once in each process; it gives the function that answers a row.
    """
    process = None
    try:
        for row in rows:
            process = process or _Process(work)
            answer = process.ask(row, seconds)
            if isinstance(answer, RowError):
                process.kill()
                process, answer = None, Answer(report=RowReport(), error=answer)
            yield answer
    finally:
        if process:
            process.kill()


class _Process:
    """A child that answers rows."""

    def __init__(self, work: Work) -> None:
        self._pipe, theirs = _CONTEXT.Pipe()
        self._process: BaseProcess = _CONTEXT.Process(target=_serve, args=(theirs, work), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(START_SECONDS):
            self.kill()
            raise TimeoutError(f"a process for single rows was not ready after {START_SECONDS:g} s")
        if (failure := self._receive()) is not None:
            self.kill()
            raise RuntimeError(f"a process for single rows could not load the model: {failure}")

    def ask(self, row: Row, seconds: float) -> Answer | RowError:
        with suppress(BrokenPipeError):  # it died since its last answer: `_receive` says how
            self._pipe.send(row)
        if not self._pipe.poll(seconds):
            return Timeout(f"no answer after {seconds:g} s, alone in a process; see --row-timeout")
        answer = self._receive()
        if isinstance(answer, Answer):
            return answer
        return WorkerCrash(f"the process died with the row, alone in it: {answer}")

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(10)
            code = self._process.exitcode
            return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _serve(pipe: Connection, work: Work) -> None:
    try:
        answer = work()
    except Exception as exc:  # told to the parent, which raises it
        pipe.send(f"{type(exc).__name__}: {exc}")
        return
    pipe.send(None)
    while True:
        try:
            pipe.send(answer(pipe.recv()))
        except EOFError:
            return
        except MemoryError as exc:
            pipe.send(f"out of memory: {exc}")

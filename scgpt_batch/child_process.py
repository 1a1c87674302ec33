"""A child process that works on one item at a time, so that native code that crashes or hangs costs that item alone."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from scgpt_batch.errors import RowError, Timeout, WorkerCrash

Work = Callable[[], Callable[[Any], Any]]  # prepares the process, then gives the function that it applies to each item

START_SECONDS = 600.0  # a new process imports the package and may load a model

# Never forked from the caller itself: threads and CUDA do not survive that. On Linux a server process imports the
# libraries once, which takes seconds, and is forked for each child; macOS's libraries do not survive even that.
_LINUX = sys.platform == "linux"
_CONTEXT = multiprocessing.get_context("forkserver") if _LINUX else multiprocessing.get_context("spawn")
_CONTEXT.set_forkserver_preload(["scgpt_batch.inference.engine"])


class ChildProcess:
    """A process that is kept for further items until one of them kills it, or takes too long."""

    def __init__(self, work: Work) -> None:
        """Start the process; `work` is picklable and runs once in it.

        Raises
        ------
        RuntimeError, TimeoutError
            `work` failed, or took too long.
        """
        self._pipe, theirs = _CONTEXT.Pipe()
        self._process: BaseProcess = _CONTEXT.Process(target=_serve, args=(theirs, work), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(START_SECONDS):
            self.kill()
            raise TimeoutError(f"a process for single rows was not ready after {START_SECONDS:g} s")
        try:
            failure = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            failure = self._death()
        if failure is not None:
            self.kill()
            raise RuntimeError(f"a process for single rows did not start: {failure}")

    def ask(self, item: Any, seconds: float) -> Any:
        """Return the function's result for an item.

        Raises
        ------
        WorkerCrash, Timeout
            The process died with the item, or had no result within `seconds`. The process is gone.
        RowError
            What the function raised.
        """
        with suppress(BrokenPipeError):  # it died since its last result: `_death` says how
            self._pipe.send(item)
        try:
            if not self._pipe.poll(seconds):
                self.kill()
                raise Timeout(f"no answer after {seconds:g} s, alone in a process")
            result = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            crash = WorkerCrash(f"the process died with the row, alone in it: {self._death()}")
            self.kill()
            raise crash from None
        if isinstance(result, MemoryError):
            self.kill()
            raise WorkerCrash(f"the process died with the row, alone in it: out of memory: {result}")
        if isinstance(result, RowError):
            raise result
        return result

    def kill(self) -> None:
        """End the process; a second time does nothing."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _death(self) -> str:
        self._process.join(10)
        code = self._process.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _serve(pipe: Connection, work: Work) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its children itself
    _end_with_parent()
    try:
        function = work()
    except Exception as exc:  # sent to the parent, which raises it
        pipe.send(f"{type(exc).__name__}: {exc}")
        return
    pipe.send(None)
    while True:
        try:
            pipe.send(_result(function, pipe.recv()))
        except EOFError:
            return


def _end_with_parent() -> None:
    """Have Linux end this process when its parent dies: a parent that was killed cannot, and native code may never end.

    The end of the pipe that the parent holds closes with it, which sends SIGIO; Python need not run to be ended by it.
    """
    parent = multiprocessing.parent_process()
    if not _LINUX or parent is None:
        return
    import fcntl  # Windows has none

    signal.signal(signal.SIGIO, signal.SIG_DFL)
    pipe = parent.sentinel  # the reading end
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)


def _result(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except (RowError, MemoryError) as exc:
        return exc

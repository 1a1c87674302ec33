"""A child process that processes one item at a time. If native code crashes or hangs, only that item is lost."""

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import get_temp_dir
from typing import Any

from scgpt_batch.errors import RowError, Timeout, WorkerCrash

Setup = Callable[[], Callable[[Any], Any]]  # runs once in the new process and returns the function for the items

START_SECONDS = 600.0  # limit for the start: the process imports the package and may load a model

# Children are not forked from the caller, because threads and CUDA do not survive a fork. On Linux, a fork server
# imports the libraries once (some seconds) and is forked for each child. On macOS, system libraries do not survive a
# fork at all, so each child is a new interpreter.
_LINUX = sys.platform == "linux"
_CONTEXT = multiprocessing.get_context("forkserver") if _LINUX else multiprocessing.get_context("spawn")
_CONTEXT.set_forkserver_preload(["scgpt_batch.inference.engine"])

# A fork server's socket is in a folder below the temporary one, and a socket's path has at most 107 bytes. Temporary
# folders of batch systems are often longer.
_LONGEST_TEMPORARY_FOLDER = 70


class ChildProcess:
    """A process that is reused for many items. An item that crashes it or exceeds the time limit ends it."""

    def __init__(self, setup: Setup) -> None:
        """Start the process and wait until it is ready.

        Parameters
        ----------
        setup
            Picklable function that runs once in the process and returns the function to apply to each item.

        Raises
        ------
        RuntimeError
            `setup` failed.
        TimeoutError
            `setup` took more than `START_SECONDS`.
        """
        _choose_socket_folder()
        self._pipe, child_end = _CONTEXT.Pipe()
        self._process: BaseProcess = _CONTEXT.Process(target=_serve, args=(child_end, setup), daemon=True)
        self._process.start()
        child_end.close()
        if not self._pipe.poll(START_SECONDS):
            self.kill()
            raise TimeoutError(f"the child process was not ready after {START_SECONDS:g} s")
        try:
            failure = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            failure = self._exit_reason()
        if failure is not None:
            self.kill()
            raise RuntimeError(f"the child process did not start: {failure}")

    def run(self, item: Any, seconds: float) -> Any:
        """Return the result of the function for an item.

        Raises
        ------
        WorkerCrash
            The process crashed or ran out of memory. It has ended.
        Timeout
            There was no result within `seconds`. The process has been killed.
        RowError
            Raised by the function; the process can be used again.
        """
        with suppress(BrokenPipeError):  # the process ended since the last item; recv below fails and says why
            self._pipe.send(item)
        try:
            if not self._pipe.poll(seconds):
                self.kill()
                raise Timeout(f"no result within {seconds:g} s, although the row had a process of its own")
            result = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            crash = _crash(self._exit_reason())
            self.kill()
            raise crash from None
        if isinstance(result, MemoryError):
            self.kill()
            raise _crash(f"out of memory: {result}")
        if isinstance(result, RowError):
            raise result
        return result

    def kill(self) -> None:
        """End the process. Idempotent."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _exit_reason(self) -> str:
        self._process.join(10)
        code = self._process.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _choose_socket_folder() -> None:
    """Have multiprocessing make its folder in /tmp if the temporary folder's path is too long for a socket."""
    if not _LINUX or len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_TEMPORARY_FOLDER:
        return
    configured = tempfile.tempdir
    tempfile.tempdir = "/tmp"
    try:
        get_temp_dir()  # makes the folder at the first call, and returns the same one at each later call
    finally:
        tempfile.tempdir = configured


def _crash(reason: str) -> WorkerCrash:
    return WorkerCrash(f"the process that computed only this row crashed ({reason}); check or split the row")


def _serve(pipe: Connection, setup: Setup) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends its children
    _end_with_parent()
    try:
        function = setup()
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
    """On Linux, end this process when its parent dies, even if the parent is killed or native code hangs here.

    When the parent dies, its end of the sentinel pipe closes and the kernel sends SIGIO. Its default action ends the
    process without running Python.
    """
    parent = multiprocessing.parent_process()
    if not _LINUX or parent is None:
        return
    import fcntl  # not available on Windows

    signal.signal(signal.SIGIO, signal.SIG_DFL)
    pipe = parent.sentinel  # the reading end
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)


def _result(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except (RowError, MemoryError) as exc:
        return exc

"""Isolated rows: after a Python worker was lost, a task processes each row in a child process.

A row that crashes native code, exhausts memory or never ends then kills only that process and becomes an error; the
next row gets a new process.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from pyspark import TaskContext

from scgpt_batch.child_process import ChildProcess
from scgpt_batch.errors import RowError, Timeout, WorkerCrash

Row = dict[str, Any]
Result = TypeVar("Result")

ISOLATED = "scgpt_batch.isolated"  # local property of Spark jobs whose tasks isolate rows


def isolates() -> bool:
    """Return whether this task isolates rows: if it is repeated, or its job has the property `ISOLATED`."""
    context = TaskContext.get()
    return context is not None and (context.attemptNumber() > 0 or context.getLocalProperty(ISOLATED) == "true")


def results_alone(
    rows: Iterable[Row], work: Callable[[], Callable[[Row], Result]], seconds: float
) -> Iterator[Result | RowError]:
    """Compute rows one by one in a child process, each within `seconds`; yield each row's result or error.

    Parameters
    ----------
    work
        A picklable function that loads the model, called once per process; it returns the function for a row.
    """
    process: ChildProcess | None = None
    try:
        for row in rows:
            process = process or ChildProcess(work)
            result: Result | RowError
            try:
                result = process.run(row, seconds)
            except WorkerCrash as exc:
                process, result = None, exc
            except Timeout as exc:
                process, result = None, Timeout(f"{exc}; see --row-timeout")
            except RowError as exc:
                result = exc
            yield result
    finally:
        if process:
            process.kill()

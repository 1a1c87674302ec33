"""One row at a time in a process of its own: what a task falls back to after it lost its Python worker.

A row that crashes native code, exhausts memory or never ends takes only that process with it and becomes an error;
the next row gets a new process.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from pyspark import TaskContext

from scgpt_batch.child_process import ChildProcess
from scgpt_batch.errors import RowError, Timeout, WorkerCrash

Row = dict[str, Any]
Result = TypeVar("Result")

ISOLATED = "scgpt_batch.isolated"  # local property of Spark jobs whose tasks take each row in a process of its own


def isolates() -> bool:
    """Whether this task takes each row in a process of its own: a repeated task, or a job that says so."""
    context = TaskContext.get()
    return context is not None and (context.attemptNumber() > 0 or context.getLocalProperty(ISOLATED) == "true")


def results_alone(
    rows: Iterable[Row], work: Callable[[], Callable[[Row], Result]], seconds: float
) -> Iterator[Result | RowError]:
    """Compute rows one by one; each has `seconds`, and costs no more than itself.

    Parameters
    ----------
    work
        A picklable function, called once in each process, that loads the model; it gives the function for a row.
    """
    process: ChildProcess | None = None
    try:
        for row in rows:
            process = process or ChildProcess(work)
            result: Result | RowError
            try:
                result = process.ask(row, seconds)
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

"""One row at a time in a process of its own: what a wave falls back to after it lost a Python worker.

A row that crashes native code, exhausts memory or never ends takes only that process with it and becomes a failed
answer; the next row gets a new process.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from scgpt_batch.answers import Answer
from scgpt_batch.child_process import ChildProcess, Work
from scgpt_batch.errors import Timeout, WorkerCrash
from scgpt_batch.prepare import RowReport

Row = dict[str, Any]


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
            process = process or ChildProcess(work)
            try:
                answer = process.ask(row, seconds)
            except WorkerCrash as exc:
                process, answer = None, Answer(report=RowReport(), error=exc)
            except Timeout as exc:
                process, answer = None, Answer(report=RowReport(), error=Timeout(f"{exc}; see --row-timeout"))
            yield answer
    finally:
        if process:
            process.kill()

"""Frames that Python workers compute, and what is done when a worker is lost or cannot work at all."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.utils import is_remote

from scgpt_batch.errors import ConfigError, in_one_line
from scgpt_batch.spark.errors import is_lost_worker
from scgpt_batch.spark.isolation import ISOLATED

logger = logging.getLogger(__name__)

Used = TypeVar("Used")

TRIES = 3  # the first as fast as possible, the others with each row in a process of its own

_WRONG = (
    re.compile(r"(?:ModuleNotFoundError|ImportError): ([^\n]+)"),
    re.compile(r"\[PYTHON_VERSION_MISMATCH\] ([^\n]+)"),
)


def worker_setup_error(exc: BaseException) -> ConfigError | None:
    """Return an error that says what the workers' Python lacks, where that is why `exc` was raised; else None.

    Spark carries the worker's own error as the text of its traceback, the cause last.
    """
    for pattern in _WRONG:
        if found := pattern.findall(str(exc)):
            return ConfigError(
                f"Spark's workers cannot run this package: {found[-1].strip()}. Install scgpt_batch in the Python of "
                "every worker (pip install scgpt_batch) and name that Python by PYSPARK_PYTHON or spark.pyspark.python"
            )
    return None


def computed(
    spark: SparkSession, make: Callable[[bool], DataFrame], use: Callable[[DataFrame], Used], what: str
) -> Used:
    """Keep a frame that workers compute on the executors' disks, and use it.

    Where a worker is lost on the way, the frame is used again: what tasks had finished is kept, and those that had not
    take each row in a process of its own. The last try computes the whole frame anew in that way.

    Parameters
    ----------
    make
        Makes the frame; True: so that its tasks isolate rows without being told (Spark Connect cannot tell them).
    what
        What is computed, for messages.
    """
    frames: list[DataFrame] = []
    try:
        for attempt in range(TRIES):
            anew = attempt > 0 and (is_remote() or attempt + 1 == TRIES)
            if anew or not frames:
                frames.append(make(anew).persist(StorageLevel.DISK_ONLY))
            try:
                with _isolation(spark, on=attempt > 0):
                    return use(frames[-1])
            except Exception as exc:  # py4j and Connect have different types for one fact
                lost = is_lost_worker(exc) and worker_setup_error(exc) is None
                if attempt + 1 == TRIES or not lost:
                    raise
                logger.warning(
                    "%s: a Python worker was lost (%s); unfinished tasks are repeated with each row in its own process",
                    what, in_one_line(exc),
                )  # fmt: skip
    finally:
        for frame in frames:
            frame.unpersist()
    raise AssertionError("unreachable")


@contextmanager
def _isolation(spark: SparkSession, *, on: bool) -> Iterator[None]:
    """Tell the tasks of this thread's jobs to isolate rows."""
    if not on or is_remote():
        yield
        return
    spark.sparkContext.setLocalProperty(ISOLATED, "true")
    try:
        yield
    finally:
        spark.sparkContext.setLocalProperty(ISOLATED, None)  # type: ignore[arg-type]

"""DataFrames that Python workers compute, and what happens if a worker is lost or cannot run the package."""

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

TRIES = 3  # the first at full speed, the others with each row in its own process

_WRONG = (
    re.compile(r"(?:ModuleNotFoundError|ImportError): ([^\n]+)"),
    re.compile(r"\[PYTHON_VERSION_MISMATCH\] ([^\n]+)"),
)


def worker_setup_error(exc: BaseException) -> ConfigError | None:
    """Return an error that says what the workers' Python lacks, if that caused `exc`; else None.

    Spark passes on the worker's error as the text of its traceback, with the cause last.
    """
    for pattern in _WRONG:
        if found := pattern.findall(str(exc)):
            return ConfigError(
                f"Spark's workers cannot run this package: {found[-1].strip()}. Install scgpt_batch in the Python of "
                "every worker (from a wheel or a clone) and name that Python by PYSPARK_PYTHON or spark.pyspark.python"
            )
    return None


def computed(
    spark: SparkSession, make: Callable[[bool], DataFrame], use: Callable[[DataFrame], Used], what: str
) -> Used:
    """Persist a DataFrame that workers compute on the executors' disks, and return what `use` returns for it.

    If a worker is lost, `use` is called again: finished tasks are kept, and unfinished tasks process each row in its
    own process. The last try recomputes the whole DataFrame in that way.

    Parameters
    ----------
    make
        Creates the DataFrame; with True, its tasks always isolate rows (Spark Connect cannot pass the setting to them).
    what
        Description of the computation, for messages.
    """
    frames: list[DataFrame] = []
    try:
        for attempt in range(TRIES):
            recompute = attempt > 0 and (is_remote() or attempt + 1 == TRIES)
            if recompute or not frames:
                frames.append(make(recompute).persist(StorageLevel.DISK_ONLY))
            try:
                with _isolation(spark, on=attempt > 0):
                    return use(frames[-1])
            except Exception as exc:  # py4j and Connect raise different types
                lost = is_lost_worker(exc) and worker_setup_error(exc) is None
                if attempt + 1 == TRIES or not lost:
                    raise
                logger.warning(
                    "%s: a Python worker was lost (%s); repeating unfinished tasks with each row in its own process",
                    what, in_one_line(exc),
                )  # fmt: skip
    finally:
        for frame in frames:
            frame.unpersist()
    raise AssertionError("unreachable")


@contextmanager
def _isolation(spark: SparkSession, *, on: bool) -> Iterator[None]:
    """Have the tasks of this thread's jobs isolate rows."""
    if not on or is_remote():
        yield
        return
    spark.sparkContext.setLocalProperty(ISOLATED, "true")
    try:
        yield
    finally:
        spark.sparkContext.setLocalProperty(ISOLATED, None)  # type: ignore[arg-type]

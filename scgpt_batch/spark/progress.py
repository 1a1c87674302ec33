"""Progress bars for work that Spark's tasks do: what is done, rate and time left, in terminals and notebooks.

The figures are for the eye only. Nothing that is written depends on them.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from threading import Event, Thread
from typing import Any
from uuid import uuid4

import tqdm.auto
from pyspark.accumulators import Accumulator
from pyspark.sql import SparkSession
from pyspark.sql.utils import is_remote

SECONDS = 0.5  # between two looks at the figures

_JOB_GROUP = "spark.jobGroup.id"


class CellProgress:
    """The cells of a run, which it embeds wave by wave.

    Attributes
    ----------
    counter
        Tasks add the cells of each finished row to it; the driver sees them when the task ends. None if no bar is
        shown, or under Spark Connect, where the bar moves between waves only.
    """

    def __init__(self, spark: SparkSession, cells: int) -> None:
        self._cells, self._finished = cells, 0
        self._base, self._wave = 0, 0
        self.counter: Accumulator | None = None
        if _is_watched() and not is_remote():
            self.counter = spark.sparkContext.accumulator(0)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar until the block ends; none if there is nothing to do."""
        with shown(lambda: (self.done(), self._cells), " cells") if self._cells else nullcontext():
            yield

    @contextmanager
    def wave(self, cells: int) -> Iterator[None]:
        """Count the cells that tasks report within the block, and at its end all cells of the wave."""
        self._base, self._wave = self._counted(), cells
        try:
            yield
        finally:
            self._wave = 0
        self._finished += cells

    def _counted(self) -> int:
        return 0 if self.counter is None else self.counter.value

    def done(self) -> int:
        """Return how many cells are done: those of finished waves, and what tasks report of the present one."""
        # a task that Spark repeats counts its cells twice
        return self._finished + min(self._counted() - self._base, self._wave)


@contextmanager
def tasks_shown(spark: SparkSession, what: str) -> Iterator[None]:
    """Show how many tasks have ended of the jobs that this thread runs in the block; `what` names the work.

    Under Spark Connect, which does not say, nothing is shown.
    """
    if not _is_watched() or is_remote():
        yield
        return
    context, group = spark.sparkContext, uuid4().hex
    before = context.getLocalProperty(_JOB_GROUP)
    context.setLocalProperty(_JOB_GROUP, group)
    try:
        with shown(lambda: _tasks(spark, group), " parts", what):
            yield
    finally:
        context.setLocalProperty(_JOB_GROUP, before)  # type: ignore[arg-type]


def _tasks(spark: SparkSession, group: str) -> tuple[int, int]:
    """Return how many tasks of a job group have ended, and how many there are in the stages that have begun."""
    tracker = spark.sparkContext.statusTracker()
    jobs = [job for i in tracker.getJobIdsForGroup(group) if (job := tracker.getJobInfo(i))]
    stages = [stage for job in jobs for i in job.stageIds if (stage := tracker.getStageInfo(i))]
    begun = [stage for stage in stages if stage.numActiveTasks or stage.numCompletedTasks]
    return sum(stage.numCompletedTasks for stage in begun), sum(stage.numTasks for stage in begun)


@contextmanager
def shown(figures: Callable[[], tuple[int, int]], unit: str, what: str = "") -> Iterator[None]:
    """Show a bar that follows `figures`, which returns what is done, and of how many; it ends with the block."""
    if not _is_watched():
        yield
        return
    bar, ended = tqdm.auto.tqdm(desc=what or None, total=figures()[1], unit=unit), Event()

    def show() -> None:
        with suppress(Exception):  # a terminal or notebook that cannot show the bar must not fail the run
            done, bar.total = figures()
            bar.update(done - bar.n)

    def follow() -> None:
        while not ended.wait(SECONDS):
            show()

    thread, complete = Thread(target=follow, name="progress", daemon=True), False
    thread.start()
    try:
        yield
        complete = True
    finally:
        ended.set()
        thread.join()
        if complete:
            show()
        with suppress(Exception):
            bar.close()


def _is_watched() -> bool:
    """Return whether a person sees the bar, in a terminal or a notebook."""
    is_notebook: Any = any("notebook" in parent.__module__ for parent in tqdm.auto.tqdm.__mro__)
    return is_notebook or sys.stderr.isatty()

"""What a run would do and how long it would take, here and on other machines."""

from collections.abc import Iterator
from dataclasses import dataclass

from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from pyspark.sql.utils import is_remote

from scgpt_batch.command_result import CommandResult, plural
from scgpt_batch.spark import tables
from scgpt_batch.spark.capacity import (
    CALCULATED,
    MEASURED,
    Capacity,
    capacities,
    capacity,
    duration,
    output_bytes,
    rate,
    size,
)
from scgpt_batch.spark.job import Job
from scgpt_batch.spark.pending import PendingRows, n_tasks
from scgpt_batch.spark.work_to_do import results_to_remove, rows_to_embed, runs_so_far

CELLS_TO_TELL = 1_000  # a run over fewer cells spends most of its time on starting
LIBRARIES_MB, ROW_MB_PER_1000_CELLS = 900, 120  # of a worker, measured: torch and scanpy; 2,000 genes per cell


@dataclass(frozen=True, kw_only=True)
class EmbedPlan(CommandResult):
    """What a run would do."""

    mode: str
    model_uri: str
    model_version: str
    rows_in: int
    rows: int
    rows_skipped: int
    rows_removed: int
    cells: int
    waves: int
    partitions: int
    largest_row_cells: int
    worker_memory_mb: int
    seconds_expected: int | None  # at the first measured rate of `capacity`; None: there is none for this session
    output_bytes: int
    capacity: list[Capacity]  # an earlier run of this mode first, then this session's cores, then common GPUs

    def lines(self) -> list[str]:
        """Say how much work is pending and what it takes, here and on other machines."""
        seconds = "unknown" if self.seconds_expected is None else duration(self.seconds_expected)
        lines = [
            f"plan only, nothing is written: {self.mode} embeddings by {self.model_uri}",
            f"{plural(self.rows, 'row')} with {plural(self.cells, 'cell')} of {self.rows_in:,} rows to embed, "
            f"{self.rows_skipped:,} skipped, {self.rows_removed:,} to remove",
            f"{plural(self.waves, 'wave')}, {plural(self.partitions, 'partition')}, "
            f"about {self.worker_memory_mb:,} MB per worker and {size(self.output_bytes)} of output; "
            f"time expected: {seconds}",
            f"{'machine':<16} {'cells/s':>10} {'these cells':>12} {'10 million':>12}  rate",
        ]
        lines += [
            f"{each.compute:<16} {rate(each.cells_per_second):>10} {duration(self.cells / each.cells_per_second):>12} "
            f"{duration(each.hours_per_ten_million_cells * 3600):>12}  {each.source}"
            for each in self.capacity
        ]
        if self.mode != "static":
            lines.append(
                "to save time: --dtype bfloat16 (GPUs, and CPUs with AMX); more cores or GPUs; --mode static, if genes "
                "without context suffice"
            )
        return lines


def plan(job: Job) -> EmbedPlan:
    """Return what a run would do and how long it would take; write nothing."""
    first = not all(tables.exists(job.spark, table) for table in (job.output, job.ledger, job.runs))
    work = rows_to_embed(job, job.rows, first=first)
    waves = list(work.waves(job.settings.wave_cells))
    cells = int(work.pending["cells"].sum())
    machines = [*_of_last_run(job), *capacities(job.parameters, job.model.config, _cores(job.spark))]
    here = next((each for each in machines if each.source != CALCULATED), None)
    gone = None if first else results_to_remove(job, runs_so_far(job))
    return EmbedPlan(
        mode=job.parameters.mode,
        model_uri=job.model.uri,
        model_version=job.model.version,
        rows_in=work.rows_in,
        rows=len(work.pending),
        rows_skipped=work.rows_in - len(work.pending),
        rows_removed=gone.rows if gone else 0,
        cells=cells,
        waves=len(waves),
        partitions=sum(map(n_tasks, waves)),
        largest_row_cells=int(work.pending["cells"].max()) if cells else 0,
        worker_memory_mb=_worker_memory(job, work),
        seconds_expected=round(cells / here.cells_per_second) if here else None,
        output_bytes=output_bytes(job.parameters, job.model.config.embsize, rows=len(work.pending), cells=cells),
        capacity=machines,
    )


def _of_last_run(job: Job) -> Iterator[Capacity]:
    """Yield the rate of the last run of this mode that spent most of its time on cells."""
    if not tables.exists(job.spark, job.runs):
        return
    runs = job.spark.table(job.runs).where(f"status = 'finished' AND cells >= {CELLS_TO_TELL}")
    last = runs.where(F.col("mode") == job.parameters.mode).orderBy(F.desc("started_at")).first()
    if last:
        yield capacity("as last run", last["cells"] / last["seconds"], f"{MEASURED} by run {last['run_id']}")


def _cores(spark: SparkSession) -> int | None:
    """Return the number of tasks that run at once on CPU cores; None for GPUs, and under Spark Connect."""
    if is_remote() or spark.conf.get("spark.task.resource.gpu.amount", None):
        return None
    return spark.sparkContext.defaultParallelism


def _worker_memory(job: Job, work: PendingRows) -> int:
    """Estimate the memory of a Python worker in MB (10⁶ bytes): libraries, weights, a batch, rows read ahead."""
    weights = sum(file.stat().st_size for file in job.model.checkpoint.iterdir()) / 1e6
    largest = int(work.pending["cells"].max()) if len(work.pending) else 0
    return round(LIBRARIES_MB + 2 * weights + ROW_MB_PER_1000_CELLS * largest / 1000)

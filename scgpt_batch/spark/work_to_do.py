"""What a run has to do: rows to embed, results of rows that are gone to remove, or nothing since an earlier run."""

import hashlib
from functools import cache
from importlib.metadata import version as installed_version

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

import scgpt_batch
from scgpt_batch.spark import tables
from scgpt_batch.spark.job import Job
from scgpt_batch.spark.local_frame import local_frame
from scgpt_batch.spark.pending import PendingRows, pending_rows
from scgpt_batch.spark.vanished import Vanished, earlier_runs, unfinished, vanished

# Packages whose version can cause one of `RETRIED_ERRORS`: the row is tried again when one of them changes.
LIBRARIES = ("scgpt_batch", "anndata", "numpy", "pandas", "pyarrow", "scanpy", "scipy", "torch")
RETRIED_ERRORS = ("InternalError", "WorkerCrash", "Timeout")


def runs_so_far(job: Job) -> pd.DataFrame | None:
    """Return the runs so far over the input and output; None without any."""
    if job.runs in job.created:
        return None
    return earlier_runs(job.spark, job.runs, job.input, job.output)


def same_state(job: Job, ledger: tables.Snapshot | None, earlier: pd.DataFrame | None) -> pd.Series | None:
    """Return an earlier run that left nothing to do, if nothing has changed since; else None.

    Runs that did not finish may have left embeddings without ledger lines, which only the tables themselves show.
    """
    if ledger is None or earlier is None or earlier["state"].isna().all() or len(unfinished(earlier)):
        return None
    state = state_of(job, ledger, job.output_snapshot())
    same = earlier[(earlier["status"] == "finished") & (earlier["state"] == state)]
    return same.iloc[0] if len(same) else None


def state_of(job: Job, ledger: tables.Snapshot, output: tables.Snapshot) -> str | None:
    """Return a hash of all that decides what a run has to do; None if a part of it is not known."""
    settings = job.settings
    if job.input_snapshot is None or settings.retry_failed or settings.trigger or settings.search_table:
        return None
    parts = [
        job.input, str(job.input_snapshot), job.output, str(output), job.ledger, str(ledger), *job.stamps.values(),
        environment(), str(float(settings.row_timeout)), str(job.parameters.min_coverage), str(settings.prune),
    ]  # fmt: skip
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def state_after(job: Job, version: int, output: tables.Snapshot) -> str | None:
    """Return the state in which the run leaves the tables; None if another run has written to the ledger meanwhile.

    Such a run may have read other contents, and its lines may count for less than those of this run.

    Parameters
    ----------
    version
        The ledger's, before this run looked for pending rows.
    """
    ledger = tables.snapshot(job.spark, job.ledger)
    if ledger is None or ledger.version != version + job.ledger_commits:
        return None
    return state_of(job, ledger, output)


def rows_to_embed(job: Job, rows: DataFrame, *, first: bool) -> PendingRows:
    """Return the rows without a result; of a first run these are all, and no ledger is read."""
    if first:
        lines = local_frame(job.spark, [], tables.fields(job.spark, tables.LEDGER))
    else:
        lines = tables.read(job.spark, job.ledger, tables.LEDGER).where(job.stamped)
    return pending_rows(rows, lines, counts=_counts(job), samples=job.samples, name=job.input)


def _counts(job: Job) -> Column:
    """Whether a ledger line is a result; the row of another is tried again."""
    if job.settings.retry_failed:
        return F.col("status") == "ok"
    elsewhere = F.col("error_class").isin(*RETRIED_ERRORS) & ~F.col("environment").eqNullSafe(F.lit(environment()))
    covered = (F.col("genes_matched") > 0) & (F.col("coverage") >= job.parameters.min_coverage)
    longer = (F.col("error_class") == "Timeout") & (F.col("row_timeout") < job.settings.row_timeout)
    outdated = elsewhere | longer | ((F.col("error_class") == "LowCoverage") & covered)
    return (F.col("status") == "ok") | ~F.coalesce(outdated, F.lit(False))


def results_to_remove(job: Job, earlier: pd.DataFrame | None) -> Vanished | None:
    """Return what earlier runs have written for rows that are gone; None without earlier runs."""
    if earlier is None or earlier.empty:
        return None
    return vanished(job.rows, output=job.output, ledger=job.ledger, runs=earlier)


@cache
def environment() -> str:
    """Return the versions of the package and its libraries, as text for the ledger."""
    return ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)


def _version(package: str) -> str:
    return scgpt_batch.__version__ if package == scgpt_batch.__name__ else installed_version(package)

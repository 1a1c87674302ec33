"""Table maintenance: delete old rows, runs and model versions, cluster files, remove unneeded files.

The ledger and runs of an output table are maintained with it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from scgpt_batch.command_result import CommandResult, plural
from scgpt_batch.errors import ConfigError
from scgpt_batch.settings import MaintainSettings
from scgpt_batch.spark import tables

logger = logging.getLogger(__name__)

SAFE_HOURS = 168  # Delta's default, a week: after it, no reader or writer should still use an older version
BESIDE = ("_ledger", "_runs")


@dataclass(frozen=True, kw_only=True)
class MaintainResult(CommandResult):
    """What was deleted, rewritten and removed."""

    table: str
    tables: list[str]
    rows_deleted: int
    files_compacted: int
    files_written: int
    files_vacuumed: int

    def lines(self) -> list[str]:
        """Say what changed in which tables."""
        return [
            f"maintained {', '.join(self.tables)}",
            f"{plural(self.rows_deleted, 'row')} deleted",
            f"{plural(self.files_compacted, 'file')} compacted into {self.files_written:,}",
            f"{plural(self.files_vacuumed, 'file')} removed that no version needs",
        ]


def maintain(spark: SparkSession, settings: MaintainSettings) -> MaintainResult:
    """Delete, cluster, compact and vacuum a table, and compact and vacuum its ledger and runs, if it has them.

    Raises
    ------
    ConfigError
        A table or column does not exist, or the retention is unsafe; nothing was changed.
    """
    table = tables.table_name(settings.table)
    if settings.vacuum_hours < SAFE_HOURS and not settings.force:
        raise ConfigError(
            f"--vacuum-hours {settings.vacuum_hours} is below {SAFE_HOURS}: running readers and writers of {table} may "
            "fail, and older versions can no longer be read; use --force if nobody needs them"
        )
    if not tables.exists(spark, table):
        raise tables.missing_table(spark, table)
    beside = [name for name in (tables.beside(table, suffix) for suffix in BESIDE) if tables.exists(spark, name)]
    runs = tables.beside(table, "_runs")
    if settings.runs_days and runs not in beside:
        raise ConfigError(f"--runs-days: {table} has no table of runs, {runs}; omit the option")
    if settings.cluster_by:
        tables.cluster(spark, table, settings.cluster_by)
    deleted = 0
    if settings.date_column:
        deleted = tables.delete_older(spark, table, settings.date_column, settings.retain_days)
        logger.info("%s: deleted %d rows older than %d days", table, deleted, settings.retain_days)
    if settings.runs_days:
        ended = tables.delete_finished_runs(spark, runs, settings.runs_days)
        logger.info("%s: deleted %d runs that finished more than %d days ago", runs, ended, settings.runs_days)
        deleted += ended
    done = [_tidy(spark, name, settings) for name in (table, *beside)]
    return MaintainResult(
        table=table,
        tables=[table, *beside],
        rows_deleted=deleted,
        files_compacted=sum(removed for removed, _, _ in done),
        files_written=sum(added for _, added, _ in done),
        files_vacuumed=sum(vacuumed or 0 for _, _, vacuumed in done),
    )


def _tidy(spark: SparkSession, table: str, settings: MaintainSettings) -> tuple[int, int, int | None]:
    removed, added = tables.compact(spark, table)
    logger.info("%s: compacted %d files into %d", table, removed, added)
    if tables.is_vacuumed_by_databricks(spark, table) and not settings.force:
        logger.info("%s: predictive optimization is on, so Databricks removes its unneeded files", table)
        return removed, added, 0
    vacuumed = tables.vacuum(spark, table, settings.vacuum_hours, unsafe=settings.force)
    logger.info("%s: vacuumed %s files", table, vacuumed)
    return removed, added, vacuumed


def prune(spark: SparkSession, output: str, ledger: str, keep: int, *, current: tuple[str, str] | None = None) -> int:
    """Delete all but each model's `keep` newest versions from an output table; return the number of deleted versions.

    The `current` model and version stay, however old: after a roll-back, the nights embed with an older version. Other
    versions are ordered as numbers if all are numbers, else by their last embedding. Their ledger lines are deleted
    first, so that a later run with such a version embeds its rows again.
    """
    seen = spark.table(output).groupBy("model_name", "model_version").agg(F.max("embedded_at").alias("last")).collect()
    pruned = 0
    for model in sorted({line["model_name"] for line in seen}):
        versions = [(line["model_version"], line["last"]) for line in seen if line["model_name"] == model]
        old = [version for version in _newest_first(versions)[keep:] if (model, version) != current]
        if old:
            logger.info("%s: deleting versions %s of %s", output, ", ".join(old), model)
            for table in (ledger, output):
                tables.delete_versions(spark, table, model, old)
        pruned += len(old)
    return pruned


def _newest_first(versions: Sequence[tuple[str, object]]) -> list[str]:
    """Return versions, given with the time of their last use, newest first."""
    numbers = all(version.isdecimal() for version, _ in versions)
    ordered = sorted(versions, key=lambda seen: int(seen[0]) if numbers else seen[1], reverse=True)  # type: ignore[arg-type,return-value]
    return [version for version, _ in ordered]

"""The command `scgpt-batch maintain`: old rows deleted, small files written together, unneeded files removed."""

import logging

from pyspark.sql import SparkSession

from scgpt_batch.errors import ConfigError
from scgpt_batch.settings import MaintainSettings, Summary
from scgpt_batch.spark import tables

logger = logging.getLogger(__name__)

SAFE_HOURS = 168  # Delta's own: a week, in which nobody should still be reading or writing an older version


def maintain(spark: SparkSession, settings: MaintainSettings) -> Summary:
    """Delete, compact and vacuum one table.

    Raises
    ------
    ConfigError
        There is no such table or column, or the retention is unsafe; nothing was changed.
    """
    table = tables.table_name(settings.table)
    if settings.vacuum_hours < SAFE_HOURS and not settings.force:
        raise ConfigError(
            f"--vacuum-hours {settings.vacuum_hours} is below {SAFE_HOURS}: whoever reads or writes {table} now may "
            "fail, and time travel to those versions ends; use --force where nobody does"
        )
    if "retain_days" in settings.model_fields_set and not settings.date_column:
        raise ConfigError("--retain-days needs --date-column: which column says how old a row is?")
    if not tables.exists(spark, table):
        raise ConfigError(f"no Delta table {table}")
    deleted = 0
    if settings.date_column:
        deleted = tables.delete_older(spark, table, settings.date_column, settings.retain_days)
        logger.info("%s: %d rows older than %d days deleted", table, deleted, settings.retain_days)
    removed, added = tables.compact(spark, table)
    logger.info("%s: %d files written together as %d", table, removed, added)
    vacuumed = tables.vacuum(spark, table, settings.vacuum_hours, unsafe=settings.force)
    logger.info("%s: %d files removed", table, vacuumed)
    return {
        "table": table,
        "rows_deleted": deleted,
        "files_compacted": removed,
        "files_written": added,
        "files_vacuumed": vacuumed,
    }

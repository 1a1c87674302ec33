"""The ingest job: files of counts, through the data source `anndata`, into an `adata_rows` table.

The table `<table>_files` gets a line for each file that was read: what was read, or why it failed. A file whose size,
time, first bytes and settings equal those of its last line is skipped if the table still has exactly its rows.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any

import pyarrow as pa
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from scgpt_batch import __version__
from scgpt_batch.command_result import OK as DONE
from scgpt_batch.command_result import TOO_MANY_FAILED_ROWS, CommandResult, plural
from scgpt_batch.errors import ConfigError, FileError
from scgpt_batch.io.files import ReadOptions
from scgpt_batch.io.locations import candidates, find_sources, name_sources
from scgpt_batch.io.open_file import source_fingerprint
from scgpt_batch.settings import IngestSettings
from scgpt_batch.spark import tables
from scgpt_batch.spark.datasource import RECORD, register
from scgpt_batch.spark.persistence import persisted
from scgpt_batch.spark.progress import tasks_shown
from scgpt_batch.spark.workers import worker_setup_error

logger = logging.getLogger(__name__)

ROW_FORMAT = 1  # increase it when the same file yields other rows, so that unchanged files are read again
MAX_NOTES = 20  # per file, in the table of files
OK, FAILED = "ok", "failed"

_CONFIG_ERROR = re.compile(r"scgpt_batch\.errors\.ConfigError: (.*)")


@dataclass(frozen=True, kw_only=True)
class IngestResult(CommandResult):
    """What a run read and wrote."""

    table: str
    files_table: str
    rows: int  # written by this run
    cells: int  # of all files that could be read
    rows_skipped: int
    rows_removed: int
    files: int
    files_unchanged: int
    files_failed: int

    def lines(self) -> list[str]:
        """Say what was read and written, and where failed files are listed."""
        written = f"{plural(self.rows, 'row')} written to {self.table}"
        lines = [
            f"{plural(self.files, 'file')} with {plural(self.cells, 'cell')}",
            f"{written}; {self.rows_skipped:,} unchanged, {self.rows_removed:,} removed",
        ]
        if self.files_failed:
            lines.append(f"{plural(self.files_failed, 'file')} failed; the reasons are in {self.files_table}")
        return lines


def ingest(spark: SparkSession, settings: IngestSettings) -> IngestResult:
    """Convert files to rows; skip unchanged files and rows, and remove rows that a file no longer has.

    Raises
    ------
    ConfigError
        A file does not exist, or a setting fits no file; nothing was written.
    """
    table = tables.table_name(settings.table)
    options = _options(settings)
    sources = find_sources(settings.input)
    while True:
        stored = _stored_rows(spark, table)
        names = name_sources(sources, options.id_from, _names_in_table(stored))
        try:
            return _ingest_sources(spark, settings, table, sources, names, stored)
        except tables.RowOfAnotherSource:
            now = name_sources(sources, options.id_from, _names_in_table(_stored_rows(spark, table)))
            if now == names:
                raise
            logger.info("another run has added a file of the same name to %s: reading again under a longer name", table)


def _ingest_sources(
    spark: SparkSession,
    settings: IngestSettings,
    table: str,
    sources: Sequence[str],
    names: Mapping[str, str],
    stored: Mapping[str, Row],
) -> IngestResult:
    options = _options(settings)
    states = _states(sources, names, options)
    files_table = tables.beside(table, "_files")
    unchanged = _unchanged(spark, files_table, states, stored)
    changed = [source for source in sources if source not in unchanged]
    if unchanged:
        logger.info("skipping %d of %d files, which are unchanged", len(unchanged), len(sources))
    result = _ingest_files(spark, table, files_table, changed, names, options, states) if changed else _Result()
    too_many = result.files_failed / len(sources) > settings.max_failed_fraction
    return IngestResult(
        exit_code=TOO_MANY_FAILED_ROWS if too_many else DONE,
        table=table,
        files_table=files_table,
        rows=result.rows,
        cells=result.cells + sum(stored[source]["cells"] or 0 for source in unchanged),
        rows_skipped=result.rows_skipped + sum(stored[source]["rows"] for source in unchanged),
        rows_removed=result.rows_removed,
        files=len(sources),
        files_unchanged=len(unchanged),
        files_failed=result.files_failed,
    )


class _Result:
    """Counts of a run, over the files that it read."""

    rows = cells = rows_skipped = rows_removed = files_failed = 0


def _options(settings: IngestSettings) -> ReadOptions:
    return ReadOptions(**settings.model_dump(include=set(ReadOptions.model_fields)))


def _stored_rows(spark: SparkSession, table: str) -> dict[str, Row]:
    """Return a summary of the table's rows by source."""
    if not tables.exists(spark, table):
        return {}
    rows = tables.read(spark, table, tables.ADATA_ROWS).where("source IS NOT NULL")
    found = rows.groupBy("source").agg(
        F.min("adata_id").alias("first_id"), F.count("*").alias("rows"), F.sum("n_obs").alias("cells"),
        _digest().alias("digest"),
    )  # fmt: skip
    return {row["source"]: row for row in found.collect()}


def _digest() -> Column:
    """Return a digest of the set of rows, independent of their order."""
    return F.bit_xor(F.xxhash64("adata_id", "content_hash", "sample_id"))


def _names_in_table(stored: Mapping[str, Row]) -> dict[str, str]:
    """Return the readable name in the keys of each source's rows."""
    names = {}
    for source, row in stored.items():
        longest_first = reversed(candidates(source))
        names[source] = next((name for name in longest_first if row["first_id"].startswith(f"{name}:")), source)
    return names


def _states(sources: Sequence[str], names: Mapping[str, str], options: ReadOptions) -> dict[str, str | None]:
    """Return a hash of everything that a file's rows depend on; None if the file is not accessible."""

    def state(source: str) -> str | None:
        try:
            file = source_fingerprint(source)
        except (ConfigError, FileError):
            return None  # reading it will report the reason
        parts = [file, names[source], options.model_dump_json(), __version__, str(ROW_FORMAT)]
        return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(sources, pool.map(state, sources), strict=True))


def _unchanged(
    spark: SparkSession, files_table: str, states: Mapping[str, str | None], stored: Mapping[str, Row]
) -> set[str]:
    """Return the files that have not changed and whose rows in the table have not changed either."""
    known = [source for source in states if source in stored]
    if not known or not tables.exists(spark, files_table):
        return set()
    lines = tables.read(spark, files_table, tables.FILES).where(F.col("path").isin(known))
    newest = lines.groupBy("path").agg(F.max_by(F.struct("*"), "at").alias("line")).select("line.*")
    return {
        line["path"]
        for line in newest.collect()
        if line["status"] == OK
        and line["fingerprint"] == states[line["path"]]
        and (line["rows"], line["rows_digest"]) == (stored[line["path"]]["rows"], stored[line["path"]]["digest"])
    }


def _ingest_files(
    spark: SparkSession,
    table: str,
    files_table: str,
    sources: Sequence[str],
    names: Mapping[str, str],
    options: ReadOptions,
    states: Mapping[str, str | None],
) -> _Result:
    stamps = {"content_hash": tables.content_hash(), "ingested_at": F.current_timestamp()}
    rows = _read_files(spark, sources, names, options)
    rows = rows.withColumns({"adata_sparsematrix": F.lit(None).cast("array<array<double>>")}).withColumns(stamps)
    with persisted(rows) as rows:  # the files are read once
        with _errors_of_the_reader(), tasks_shown(spark, "reading"):
            files = _outcomes(rows)
        _report(files)
        good = [file["source"] for file in files if file["error_class"] is None]
        _raise_if_no_file_fits(files, good)
        result = _Result()
        if good:
            report = ("layer", "notes", "error_class", "error_message")
            new = _rows_of(rows, good).drop(*report)
            about = "Single-cell counts: a line holds some cells as a serialized AnnData"
            tables.create(spark, table, tables.ADATA_ROWS, comment=about, key="adata_id")
            gone = _vanished(spark, table, new, good)
            with tasks_shown(spark, "writing"):
                result.rows, result.rows_removed = tables.upsert_rows(spark, table, new, gone)
    result.cells = sum(file["cells"] or 0 for file in files if file["error_class"] is None)
    found = sum(file["rows"] for file in files if file["error_class"] is None)
    result.rows_skipped = found - result.rows
    result.files_failed = len(files) - len(good)
    _record(spark, files_table, files, states)
    return result


def _rows_of(rows: DataFrame, good: Sequence[str]) -> DataFrame:
    """Return the rows of files that were read without an error.

    Spark may read a file again: on serverless compute, or if a worker is lost. A file that then fails has a line
    without adata_id, which must fail the run. Otherwise its rows would count as removed from the file.
    """
    failed = F.concat(F.col("source"), F.lit(" was read once and then failed: "), F.col("error_message"))
    adata_id = F.coalesce("adata_id", F.raise_error(failed))
    return rows.where(F.col("source").isin(list(good))).withColumn("adata_id", adata_id)


def _read_files(
    spark: SparkSession, sources: Sequence[str], names: Mapping[str, str], options: ReadOptions
) -> DataFrame:
    register(spark)
    given = {name: str(value) for name, value in options.model_dump().items()}
    named = json.dumps({source: names[source] for source in sources})
    reader = spark.read.format("anndata").options(**given, names=named, on_error=RECORD)
    with _errors_of_the_reader():
        return reader.load(list(sources))


@contextmanager
def _errors_of_the_reader() -> Iterator[None]:
    """Raise our own error where Spark passes it on as the text of a Python traceback."""
    try:
        yield
    except PySparkException as exc:
        if messages := _CONFIG_ERROR.findall(str(exc)):
            raise ConfigError(messages[-1]) from exc
        if error := worker_setup_error(exc):
            raise error from exc
        raise


def _outcomes(rows: DataFrame) -> list[Row]:
    """Read all files; return a summary of each file's rows, or its first error."""
    notes = F.slice(F.array_distinct(F.flatten(F.collect_set("notes"))), 1, MAX_NOTES)
    error = F.max_by(F.struct("error_class", "error_message"), F.col("error_class").isNotNull())
    grouped = rows.groupBy("source").agg(
        F.count("adata_id").alias("rows"), F.sum("n_obs").alias("cells"), F.max("layer").alias("layer"),
        notes.alias("notes"), error.alias("error"), _digest().alias("digest"),
    )  # fmt: skip
    return grouped.select("*", "error.*").drop("error").orderBy("source").collect()


def _report(files: Sequence[Row]) -> None:
    for file in files:
        if file["error_class"] is None:
            logger.info("%s: %s", file["source"], "; ".join(file["notes"]))
        else:
            logger.error("failed: %s (%s)", file["error_message"], file["error_class"])


def _raise_if_no_file_fits(files: Sequence[Row], good: Sequence[str]) -> None:
    """Raise ConfigError if every file failed for a reason that settings can fix: a setting is then wrong."""
    if good or any(file["error_class"] != ConfigError.__name__ for file in files):
        return
    more = f" (and {len(files) - 1} other files fail too)" if len(files) > 1 else ""
    raise ConfigError(f"{files[0]['error_message']}{more}")


def _vanished(spark: SparkSession, table: str, new: DataFrame, sources: Sequence[str]) -> DataFrame | None:
    """Return the ids of rows that these files no longer have; None if there are none.

    Raises
    ------
    RowOfAnotherSource
        A new row has the id of another file's row.
    """
    stored = tables.read(spark, table, tables.ADATA_ROWS).select("adata_id", F.col("source").alias("stored"))
    ids = new.select("adata_id", "source")
    both = stored.join(ids, "adata_id", "left").where(
        (F.col("source").isNull() & F.col("stored").isin(list(sources))) | (F.col("source") != F.col("stored"))
    )
    found = both.collect()
    for row in found:
        if row["source"] is not None:
            raise tables.RowOfAnotherSource(
                f"{table}: row {row['adata_id']!r} comes from {row['stored']}, and {row['source']} would replace it: "
                "use --id-from path"
            )
    gone = [row["adata_id"] for row in found]
    return spark.createDataFrame(pa.table({"adata_id": gone})) if gone else None


def _record(spark: SparkSession, files_table: str, files: Sequence[Row], states: Mapping[str, str | None]) -> None:
    """Append a line for each file that was read to the table of files."""
    now = datetime.now(UTC)
    lines: list[dict[str, Any]] = [
        {
            "path": file["source"],
            "status": OK if file["error_class"] is None else FAILED,
            "layer": file["layer"],
            "notes": file["notes"],
            "rows": file["rows"],
            "cells": file["cells"],
            "error_class": file["error_class"],
            "error_message": file["error_message"],
            "fingerprint": states[file["source"]],
            "rows_digest": file["digest"],
            "package_version": __version__,
            "at": now,
        }
        for file in files
    ]
    tables.create(spark, files_table, tables.FILES, comment="Files that ingest read, and what became of them")
    tables.append(spark, files_table, tables.FILES, lines)

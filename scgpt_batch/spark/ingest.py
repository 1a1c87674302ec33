"""The ingest job: files of counts, through the data source `anndata`, into an `adata_rows` table."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyspark import StorageLevel
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from scgpt_batch.errors import ConfigError
from scgpt_batch.settings import IngestSettings, Summary
from scgpt_batch.spark import tables

logger = logging.getLogger(__name__)

_CONFIG_ERROR = re.compile(r"scgpt_batch\.errors\.ConfigError: (.*)")


def ingest(spark: SparkSession, settings: IngestSettings) -> Summary:
    """Turn files into rows; rows that the table holds already, with the same content, are skipped.

    Raises
    ------
    ConfigError
        A file is missing, unreadable or lacks a column that was asked for; nothing was written.
    """
    table = tables.table_name(settings.table)
    rows = (
        _read_files(spark, settings)
        .withColumns({"adata_sparsematrix": F.lit(None).cast("array<array<double>>")})
        .withColumns({"content_hash": tables.content_hash(), "ingested_at": F.current_timestamp()})
    )
    rows = rows.persist(StorageLevel.DISK_ONLY)  # the files are read once
    try:
        with _errors_of_the_reader():
            (found,) = rows.agg(F.count("*").alias("rows"), F.sum("n_obs").alias("cells")).collect()
        tables.create(spark, table, tables.ADATA_ROWS)
        _refuse_other_source(spark, table, rows)
        changed = tables.upsert_rows(spark, table, rows)
    finally:
        rows.unpersist()
    return {
        "table": table,
        "rows": changed,
        "cells": found["cells"] or 0,
        "rows_skipped": found["rows"] - changed,
    }


def _read_files(spark: SparkSession, settings: IngestSettings) -> DataFrame:
    if int(spark.version.split(".")[0]) < 4:
        raise ConfigError(
            f"ingest reads files through a Python data source: Spark 4.0 is needed, this is {spark.version}"
        )
    from scgpt_batch.spark.datasource import register  # Spark 3.5 has no such API, but can embed

    register(spark)
    reader = spark.read.format("anndata").option("cells_per_row", str(settings.cells_per_row))
    reader = reader.option("split_by", settings.split_by).option("gene_symbols", settings.gene_symbols)
    with _errors_of_the_reader():
        return reader.load([str(Path(name).absolute()) for name in settings.input])


@contextmanager
def _errors_of_the_reader() -> Iterator[None]:
    """Raise our own error again where Spark carries it as the text of a Python process's traceback."""
    try:
        yield
    except PySparkException as exc:
        told = _CONFIG_ERROR.findall(str(exc))
        if not told:
            raise
        raise ConfigError(told[-1]) from exc


def _refuse_other_source(spark: SparkSession, table: str, rows: DataFrame) -> None:
    """Refuse to replace rows that came from another file of the same name."""
    there = tables.read(spark, table, tables.ADATA_ROWS).select(
        "adata_id", F.col("source").alias("held"), F.col("content_hash").alias("held_hash")
    )
    new = rows.select("adata_id", "source", "content_hash")
    other = new.join(there, "adata_id").where("source <> held AND content_hash <> held_hash").first()
    if other:
        raise ConfigError(
            f"{table} holds row {other['adata_id']!r} from {other['held']}, which {other['source']} would replace: "
            "rename the file or take another table"
        )

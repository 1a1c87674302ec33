"""The package's Delta tables: their columns, and the only code that reads and writes Delta.

It uses only SQL and DataFrames, so that it also runs under Spark Connect.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar
from uuid import uuid4

from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    DataType,
    DateType,
    NumericType,
    StringType,
    StructType,
    TimestampNTZType,
    TimestampType,
)

from scgpt_batch import __version__ as package_version
from scgpt_batch.errors import ConfigError, ScgptBatchError, in_one_line, suggestion
from scgpt_batch.io.locations import beside as beside
from scgpt_batch.io.locations import delta_path, tables_in_folder
from scgpt_batch.io.locations import table_name as table_name
from scgpt_batch.io.rows import PAYLOAD_COLUMNS
from scgpt_batch.near_misses import closest, did_you_mean
from scgpt_batch.spark.comments import COLUMN_COMMENTS
from scgpt_batch.spark.errors import is_conflict, is_denied, is_folder_refused, is_location_taken, is_not_supported
from scgpt_batch.spark.local_frame import local_frame
from scgpt_batch.spark.session import on_databricks

logger = logging.getLogger(__name__)

Written = TypeVar("Written")

ADATA_ROWS = """
    adata_id STRING NOT NULL, adata_sparsematrix ARRAY<ARRAY<DOUBLE>>,
    x_data ARRAY<FLOAT>, x_indices ARRAY<INT>, x_indptr ARRAY<BIGINT>,
    n_obs INT, n_vars INT, sample_id STRING, adata_obs STRING, adata_var STRING,
    source STRING, content_hash STRING, ingested_at TIMESTAMP, x_dtype STRING
"""
_STAMPS = """
    mode STRING, model_name STRING, model_version STRING, params_hash STRING, content_hash STRING, run_id STRING,
    embedded_at TIMESTAMP, package_version STRING, embedding_id STRING
"""
GENE_EMBEDDINGS = f"adata_id STRING, `group` STRING, gene STRING, embedding ARRAY<FLOAT>, n_cells INT, {_STAMPS}"
CELL_EMBEDDINGS = f"adata_id STRING, cell_id STRING, embedding ARRAY<FLOAT>, {_STAMPS}"
_MODEL_KEY = ("mode", "model_name", "model_version", "params_hash")
GENE_KEY = ("adata_id", "group", "gene", *_MODEL_KEY)
CELL_KEY = ("adata_id", "cell_id", *_MODEL_KEY)
LEDGER = """
    adata_id STRING, content_hash STRING, mode STRING, model_name STRING, model_version STRING, params_hash STRING,
    status STRING, cells BIGINT, embeddings BIGINT, genes_in INT, genes_matched INT, coverage DOUBLE,
    warnings ARRAY<STRING>, error_class STRING, error_message STRING, run_id STRING, at TIMESTAMP,
    sample_id STRING, sample_hash STRING, environment STRING, row_timeout DOUBLE
"""
RUNS = """
    run_id STRING, started_at TIMESTAMP, finished_at TIMESTAMP, status STRING, mode STRING, model_uri STRING,
    model_version STRING, params STRING, rows_in BIGINT, rows_ok BIGINT, rows_failed BIGINT, rows_skipped BIGINT,
    cells BIGINT, embeddings BIGINT, seconds DOUBLE, input_table STRING, input_version BIGINT, output_table STRING,
    output_version BIGINT, package_version STRING, rows_removed BIGINT, state STRING
"""

FILES = """
    path STRING, status STRING, layer STRING, notes ARRAY<STRING>, rows BIGINT, cells BIGINT, error_class STRING,
    error_message STRING, fingerprint STRING, rows_digest BIGINT, package_version STRING, at TIMESTAMP
"""

# Columns that identify a table as ours. Other columns of ours are added to tables that lack them.
IDENTITY = {
    "adata_id", "group", "gene", "cell_id", "embedding", "mode", "model_name", "model_version", "params_hash", "run_id",
    "status", "x_data", "adata_obs", "adata_var", "program", "score", "term", "label", "metric", "source_table",
}  # fmt: skip

_CHECK = "spark.databricks.delta.replaceWhere.constraintCheck.enabled"
_CHECK_LOCK = Lock()  # threads of one session share its settings
_VECTOR_LENGTH = "delta.constraints.vector_length"

TAG = "scgpt_batch"  # of tables in Unity Catalog; its value is the version that created the table
_OLD_METASTORE = ("hive_metastore", "spark_catalog")

_ANOTHER_SOURCE = "row of another source"  # raised in SQL, and found in the error's text

COMMIT_TRIES = 12  # over about four minutes
CREATE_TRIES = 4  # over about seven seconds: other runs create the table at most once

# Hadoop does not report the cause; list the likely ones
_NO_FOLDER = "No space left, a Read-only file system, no permission, or a file in place of a folder"


@dataclass(frozen=True)
class Snapshot:
    """A version of a Delta table, and when it was committed: a table made anew at the same place has another time."""

    version: int
    at: datetime


class FolderTaken(ConfigError):
    """A table's folder has files that are not a Delta table; another run may be creating the table."""


class RowOfAnotherSource(ConfigError):
    """A new row has the key of a row from another file."""


def exists(spark: SparkSession, table: str) -> bool:
    """Return whether a Delta table of this name or path exists."""
    try:
        if spark.catalog.tableExists(table):
            return True
        spark.sql(f"DESCRIBE DETAIL {table}").collect()
        return True
    except AnalysisException:
        return _found_in_warehouse(spark, table)


def missing_table(spark: SparkSession, table: str) -> ConfigError:
    """Return the error for a table that does not exist; it suggests a table of a similar name beside it."""
    path = delta_path(table)
    folder, _, name = path.rpartition("/") if path else table.rpartition(".")
    close = closest(name, tables_in_folder(folder) if path else _tables_in_schema(spark, folder))
    if close is None:
        return ConfigError(f"there is no Delta table {table}: check its name, or run the command that creates it")
    meant = f"delta.`{folder}/{close}`" if path else f"{folder}.{close}".lstrip(".")
    return ConfigError(f"there is no Delta table {table}: did you mean {meant}?")


def _tables_in_schema(spark: SparkSession, schema: str) -> list[str]:
    try:
        found = spark.sql(f"SHOW TABLES IN {schema}" if schema else "SHOW TABLES").collect()
    except AnalysisException:  # there is no such schema
        return []
    return [row["tableName"] for row in found]


def read(spark: SparkSession, table: str, columns: str, *, version: int | None = None) -> DataFrame:
    """Read a table or view with at least `columns` (DDL): missing ones are null, further ones are passed through.

    Column names are matched case-insensitively and renamed to ours. `version` None reads the newest snapshot.

    Raises
    ------
    ConfigError
        The table does not exist, has no `adata_id`, or a column's type cannot be converted to ours.
    """
    if not exists(spark, table):
        raise missing_table(spark, table)
    return _completed(at_version(spark, table, version), table, columns)


def at_version(spark: SparkSession, table: str, version: int | None) -> DataFrame:
    """Return a table at a version of it; None: at the newest, or a view."""
    return spark.table(table) if version is None else spark.sql(f"SELECT * FROM {table} VERSION AS OF {version}")


def read_stream(spark: SparkSession, table: str, columns: str) -> DataFrame:
    """Read a table as a stream with at least `columns`; rows of files that an update rewrites are repeated."""
    reader = spark.readStream.format("delta").option("ignoreChanges", "true")
    path = delta_path(table)
    return _completed(reader.load(path) if path else reader.table(table), table, columns)


def _completed(rows: DataFrame, table: str, columns: str) -> DataFrame:
    wanted = {field.name.lower(): field for field in fields(rows.sparkSession, columns)}
    existing = {field.name.lower(): field for field in rows.schema}
    if "adata_id" in wanted and "adata_id" not in existing:
        raise ConfigError(f"{table} has no column adata_id: each row needs a key")
    columns_read = []
    for name, field in existing.items():
        column = F.col(_quoted(field.name))
        if name in wanted:
            column = _as_ours(column, field.dataType, wanted[name].dataType, f"{table}: column {field.name}")
        columns_read.append(column.alias(wanted[name].name if name in wanted else field.name))
    missing = [field for name, field in wanted.items() if name not in existing]
    nulls = [F.lit(None).cast(field.dataType).alias(field.name) for field in missing]
    return rows.select(*columns_read, *nulls)


def create(
    spark: SparkSession,
    table: str,
    columns: str,
    *,
    vector_length: int | None = None,
    comment: str = "",
    key: str = "",
) -> bool:
    """Create a table with these columns unless it exists; return whether it was created.

    An existing table gets the columns that newer versions of this package added. With `vector_length`, the table
    accepts vectors of that length only, and keeps a change feed, so that a search index can follow it.

    Parameters
    ----------
    comment
        What catalogs show for a new table, without quotes.
    key
        Column that identifies a line; in Unity Catalog a new table gets it as its (informational) primary key.

    Raises
    ------
    ConfigError
        A table of this name is not ours or has vectors of another length, its folder has other files, or a permission
        is missing; nothing was changed.
    ScgptBatchError
        The file system is not writable.
    """
    if exists(spark, table):
        _adapt(spark, table, columns, vector_length)
        return False
    schema = table.rsplit(".", 1)[0] if not delta_path(table) and "." in table else None
    # Unity Catalog checks the permission to create schemas even if the schema exists
    if schema and not spark.catalog.databaseExists(schema):
        with _explained_denial(f"create schema {schema}", "CREATE SCHEMA and USE CATALOG on its catalog"):
            spark.sql(f"CREATE SCHEMA IF NOT EXISTS {schema}")
    governed = is_in_unity_catalog(spark, table)
    described = _described(columns, key if governed else "")
    about = f"COMMENT '{comment}'" if comment else ""
    properties = "" if vector_length is None else f"TBLPROPERTIES ({_properties(vector_length)})"
    statement = f"CREATE TABLE IF NOT EXISTS {table} ({described}) USING delta {about} {properties}"
    with _explained_denial(f"create table {table}", "CREATE TABLE and USE SCHEMA on its schema"):
        _retried(table, lambda: _create(spark, table, statement), tries=CREATE_TRIES)
    if governed:
        _tag(spark, table)
    return True


def is_in_unity_catalog(spark: SparkSession, table: str) -> bool:
    """Return whether a table's name is one of Unity Catalog: on Databricks, and not in its old metastore."""
    if delta_path(table) or not on_databricks():
        return False
    parts = table.replace("`", "").split(".")
    catalog = parts[0] if len(parts) == 3 else spark.catalog.currentCatalog()
    return catalog not in _OLD_METASTORE


def _described(columns: str, key: str) -> str:
    """Add comments to columns (DDL), and a primary key, whose column Unity Catalog wants to be not null."""
    described = []
    for column in columns.split(","):
        name = column.split()[0].strip("`")
        required = " NOT NULL" if name == key and "NOT NULL" not in column else ""
        comment = f" COMMENT '{COLUMN_COMMENTS[name]}'" if name in COLUMN_COMMENTS else ""
        described.append(f"{column.strip()}{required}{comment}")
    return ", ".join([*described, *([f"PRIMARY KEY ({_quoted(key)})"] if key else [])])


def _tag(spark: SparkSession, table: str) -> None:
    """Set the tag by which catalogs find our tables; a policy for tags may forbid it."""
    try:
        spark.sql(f"ALTER TABLE {table} SET TAGS ('{TAG}' = '{package_version}')")
    except Exception as exc:  # py4j and Connect raise different types
        if not is_denied(exc):
            raise
        logger.info("%s has no tag %r: %s", table, TAG, in_one_line(exc))


@contextmanager
def _explained_denial(action: str, needed: str) -> Iterator[None]:
    """Raise a denied permission as a ConfigError that names the one needed."""
    try:
        yield
    except Exception as exc:  # py4j and Connect raise different types
        if not is_denied(exc):
            raise
        raise ConfigError(
            f"cannot {action}: permission denied ({in_one_line(exc)}). It needs {needed}: ask its owner for that, "
            "or to create it for you"
        ) from exc


def _create(spark: SparkSession, table: str, statement: str) -> None:
    """Create the table and check that it exists.

    While another run has created a table's folder but not its first commit, Delta reports a non-empty location or, for
    a table at a path, success. A run that was killed at this point leaves the same state, so only waiting tells them
    apart.
    """
    try:
        spark.sql(statement)
    except Exception as exc:  # errors of Java's file systems have no class of their own in Python
        if is_folder_refused(exc):
            raise ScgptBatchError(f"cannot create the folder of {table}; possible causes: {_NO_FOLDER}") from exc
        if not is_location_taken(exc):
            raise
    if not exists(spark, table):
        raise FolderTaken(
            f"cannot create table {table}: its folder holds files that are not a Delta table. Name another table; if a "
            "run was killed while it created this one, remove the folder"
        )


def replace(rows: DataFrame, table: str, condition: Callable[[], str]) -> None:
    """Replace the rows that meet `condition` by `rows`, in one commit; all of `rows` must meet it.

    Idempotent. Of two concurrent writers of a table, Delta rejects the later one, which tries again and then sees what
    the first has written; `condition` is evaluated again for each try. Threads of one process write in turn.
    """
    writer = rows.write.format("delta").mode("overwrite").option("compression", "zstd")
    with _CHECK_LOCK, _lines_unchecked(rows.sparkSession):
        _retried(table, lambda: writer.option("replaceWhere", condition()).saveAsTable(table))


@contextmanager
def _lines_unchecked(spark: SparkSession) -> Iterator[None]:
    """Switch off Delta's check that each written row meets `replaceWhere`.

    The check compares each row with every one of a wave's thousands of keys, which takes longer than all other work on
    small rows. Where the setting cannot be changed (Databricks serverless), the check stays on.
    """
    try:
        before = spark.conf.get(_CHECK, None)
        spark.conf.set(_CHECK, "false")
    except PySparkException as exc:
        logger.info("cannot change %s, waves of many small rows are written more slowly: %s", _CHECK, in_one_line(exc))
        yield
        return
    try:
        yield
    finally:
        if before is None:
            spark.conf.unset(_CHECK)
        else:
            spark.conf.set(_CHECK, before)


def delete_lines(table: str, lines: DataFrame, runs: Sequence[str]) -> None:
    """Delete the rows of some runs that equal one of `lines` in all of its columns, in one commit.

    Parameters
    ----------
    lines
        Distinct rows without nulls.
    """
    same = [f"t.{identifier(name)} = s.{identifier(name)}" for name in lines.columns]
    written = f"t.run_id IN ({', '.join(map(literal, runs))})"
    _merge(lines.sparkSession, table, lines, f"{' AND '.join([*same, written])} WHEN MATCHED THEN DELETE")


def insert(spark: SparkSession, table: str, values: Mapping[str, str | float | datetime]) -> None:
    """Insert one row with SQL, so that no Python worker can be lost. Columns not named are null."""
    literals = ", ".join(map(literal, values.values()))
    _retried(table, lambda: spark.sql(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({literals})"))


def update(spark: SparkSession, table: str, values: Mapping[str, str | float | datetime], condition: str) -> None:
    """Set columns of the rows that meet `condition`, in one commit."""
    assignments = ", ".join(f"{name} = {literal(value)}" for name, value in values.items())
    _retried(table, lambda: spark.sql(f"UPDATE {table} SET {assignments} WHERE {condition}"))


def literal(value: str | float | datetime) -> str:
    """Return a string, a number or a time (with its zone) as an SQL literal.

    Strings do not depend on the session's settings: Spark replaces `${name}` in SQL text, and may treat backslashes as
    escapes. Strings with such characters are therefore written as bytes.
    """
    if isinstance(value, datetime):
        return f"TIMESTAMP '{value.isoformat()}'"
    if not isinstance(value, str):
        return repr(value)
    if value.isprintable() and not set(value) & set("'\\$"):
        return f"'{value}'"
    return f"CAST(X'{value.encode().hex()}' AS STRING)"


def identifier(name: str) -> str:
    """Quote a column's name for SQL.

    Raises
    ------
    ConfigError
        It contains `${`, which Spark replaces in SQL text.
    """
    if "${" in name:
        raise ConfigError(f"column {name!r} contains ${{...}}, which Spark replaces in SQL: rename the column")
    return _quoted(name)


def _quoted(name: str) -> str:
    return f"`{name.replace('`', '``')}`"


def _retried(table: str, write: Callable[[], Written], *, tries: int = COMMIT_TRIES) -> Written:
    """Commit, and retry after conflicts with other writers of the table; return the commit's result."""
    for attempt in range(tries):
        try:
            return write()
        except Exception as exc:  # py4j and Connect raise different types for conflicts
            if attempt + 1 == tries or not (is_conflict(exc) or isinstance(exc, FolderTaken)):
                raise
            seconds = random.uniform(0.5, 1.5) * 2 ** min(attempt, 5)
            logger.info("%s: conflict with another writer, retrying in %.0f s", table, seconds)
            time.sleep(seconds)
    raise AssertionError("unreachable")


def upsert_rows(spark: SparkSession, table: str, rows: DataFrame, gone: DataFrame | None = None) -> tuple[int, int]:
    """Insert new AnnData rows, replace those with changed content or sample, and delete `gone`, in one commit.

    Parameters
    ----------
    gone
        The `adata_id` of rows to delete.

    Returns
    -------
    Numbers of rows inserted or replaced, and deleted.

    Raises
    ------
    RowOfAnotherSource
        A row of the table has the `adata_id` of a new one and comes from another `source`; nothing was changed.
    """
    names = rows.columns
    updates, values = ", ".join(f"{n} = s.{n}" for n in names), ", ".join(f"s.{n}" for n in names)
    source = rows.withColumn("_gone", F.lit(False))
    if gone is not None:
        deleted = gone.select("adata_id", F.lit(True).alias("_gone"))
        source = source.unionByName(deleted, allowMissingColumns=True)
    clauses = f"""t.adata_id = s.adata_id
        WHEN MATCHED AND s._gone THEN DELETE
        WHEN MATCHED AND t.source <> s.source THEN UPDATE SET source = raise_error('{_ANOTHER_SOURCE}')
        WHEN MATCHED AND NOT (t.content_hash <=> s.content_hash AND t.sample_id <=> s.sample_id)
        THEN UPDATE SET {updates}
        WHEN NOT MATCHED AND NOT s._gone THEN INSERT ({", ".join(names)}) VALUES ({values})"""
    try:
        merged = _merge(spark, table, source, clauses)
    except Exception as exc:  # py4j and Connect raise different types for errors of SQL
        if f"[USER_RAISED_EXCEPTION] {_ANOTHER_SOURCE}" in str(exc):
            raise RowOfAnotherSource(f"{table}: a new row has the adata_id of a row of another file") from exc
        raise
    return merged["num_inserted_rows"] + merged["num_updated_rows"], merged["num_deleted_rows"]


def merge_lines(spark: SparkSession, table: str, lines: DataFrame, gone: DataFrame) -> tuple[int, int]:
    """Insert embeddings, replace those with the same `embedding_id`, and delete `gone`, in one commit.

    Parameters
    ----------
    gone
        The `embedding_id` of lines to delete.

    Returns
    -------
    Numbers of lines inserted or replaced, and deleted.
    """
    names = [_quoted(name) for name in lines.columns]
    source = lines.withColumn("_gone", F.lit(False))
    source = source.unionByName(gone.withColumn("_gone", F.lit(True)), allowMissingColumns=True)
    clauses = f"""t.embedding_id = s.embedding_id
        WHEN MATCHED AND s._gone THEN DELETE
        WHEN MATCHED THEN UPDATE SET {", ".join(f"{name} = s.{name}" for name in names)}
        WHEN NOT MATCHED AND NOT s._gone THEN INSERT ({", ".join(names)})
        VALUES ({", ".join(f"s.{name}" for name in names)})"""
    merged = _merge(spark, table, source, clauses)
    return merged["num_inserted_rows"] + merged["num_updated_rows"], merged["num_deleted_rows"]


def append(spark: SparkSession, table: str, columns: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a table, in one commit. Columns not named are null."""
    schema = fields(spark, columns)
    rows = local_frame(spark, [[line.get(field.name) for field in schema] for line in lines], schema)
    _retried(table, lambda: rows.write.format("delta").mode("append").saveAsTable(table))


def _merge(spark: SparkSession, table: str, rows: DataFrame, clauses: str) -> Row:
    """Merge rows (`s`) into a table (`t`) in one commit; return Delta's counts of changed rows."""
    view = f"_scgpt_{uuid4().hex}"
    rows.createOrReplaceTempView(view)
    try:
        merged = _retried(table, lambda: spark.sql(f"MERGE INTO {table} t USING {view} s ON {clauses}"))
        counts = merged.first()
        assert counts is not None  # MERGE returns one row
        return counts
    finally:
        spark.catalog.dropTempView(view)


def version(spark: SparkSession, table: str) -> int:
    """Return the newest version of a Delta table."""
    return _newest(spark, table)["version"]


def snapshot(spark: SparkSession, table: str) -> Snapshot | None:
    """Return the newest snapshot of a table to read at; None for a view or a table of another format."""
    try:
        newest = _newest(spark, table)
    except AnalysisException:
        return None
    return Snapshot(newest["version"], newest["timestamp"])


def _newest(spark: SparkSession, table: str) -> Row:
    """Return the entry of a table's newest version in its history."""
    newest = spark.sql(f"DESCRIBE HISTORY {table} LIMIT 1").first()
    assert newest is not None  # a table has a version
    return newest


def row_hash() -> Column:
    """Return a row's content hash: its `content_hash`, or else the computed one."""
    return F.coalesce("content_hash", content_hash())


def content_hash() -> Column:
    """Return the hash of the columns that determine a row's result, except its sample: payload, x_dtype and shape.

    128 bits as 32 hexadecimal digits, computed in the JVM without Python. Null columns do not change it.
    """
    payload = [F.col(name) for name in (*PAYLOAD_COLUMNS, "x_dtype", "n_obs", "n_vars")]
    halves = [F.lpad(F.lower(F.hex(F.xxhash64(F.lit(seed), *payload))), 16, "0") for seed in (0, 1)]
    return F.concat(*halves)


def embedding_id(key: Sequence[str]) -> str:
    """Return the SQL expression of a line's `embedding_id`: the first 128 bits of the SHA-256 of its key, in hex.

    Each value of the key is preceded by its length in bytes, and null is written as `-`, so that different keys never
    have the same text. No function of it depends on the version of Spark.

    Parameters
    ----------
    key
        The key's columns, of type string.
    """
    columns = [_quoted(name) for name in key]
    texts = [f"coalesce(concat(octet_length({column}), ':', {column}), '-')" for column in columns]
    return f"left(sha2(concat({', '.join(texts)}), 256), 32)"


def fill_embedding_ids(spark: SparkSession, table: str, key: Sequence[str]) -> None:
    """Write the `embedding_id` of lines that have none, because an earlier version of this package wrote them."""
    if spark.table(table).where("embedding_id IS NULL").isEmpty():
        return
    logger.info("%s: writing embedding_id to the lines of an earlier version", table)
    fill = f"UPDATE {table} SET embedding_id = {embedding_id(key)} WHERE embedding_id IS NULL"
    _retried(table, lambda: spark.sql(fill))


def fields(spark: SparkSession, columns: str) -> StructType:
    """Return the schema of columns in DDL."""
    return spark.createDataFrame([], columns).schema


def _as_ours(column: Column, have: DataType, want: DataType, where: str) -> Column:
    """Convert a column to our type if it is of the same kind; numbers become keys, dates become timestamps."""
    if have == want or _same_kind(have, want):
        return column
    if isinstance(want, TimestampType) and isinstance(have, TimestampNTZType | DateType):
        return column.cast(want)
    if isinstance(want, StringType) and isinstance(have, NumericType):
        return column.cast(want)
    raise ConfigError(f"{where} has type {have.simpleString()}, {want.simpleString()} is needed: cast the column")


def _same_kind(have: DataType, want: DataType) -> bool:
    if isinstance(have, ArrayType) and isinstance(want, ArrayType):
        return _same_kind(have.elementType, want.elementType)
    return any(isinstance(have, kind) and isinstance(want, kind) for kind in (NumericType, StringType))


def _adapt(spark: SparkSession, table: str, columns: str, vector_length: int | None) -> None:
    """Add missing columns to a table, after checking that it is ours and has vectors of this length."""
    have = {field.name.lower(): field.dataType for field in spark.table(table).schema}
    wanted = fields(spark, columns)
    wrong = [f for f in wanted if have.get(f.name.lower(), None if f.name in IDENTITY else f.dataType) != f.dataType]
    if wrong:
        lacking = ", ".join(f"{field.name} {field.dataType.simpleString()}" for field in wrong)
        raise ConfigError(f"{table} is not a table of scgpt_batch: it lacks {lacking}; use another table")
    if vector_length is not None:
        _check_vector_length(spark, table, vector_length)
    new = [field for field in wanted if field.name.lower() not in have]
    if new:
        added = ", ".join(f"`{field.name}` {field.dataType.simpleString()}" for field in new)
        spark.sql(f"ALTER TABLE {table} ADD COLUMNS ({_described(added, '')})")
        logger.info("%s: added columns %s", table, added)


def _check_vector_length(spark: SparkSession, table: str, length: int) -> None:
    """Raise ConfigError if the table has vectors of another length, by its constraint or else its first vector."""
    properties = {row["key"]: row["value"] for row in spark.sql(f"SHOW TBLPROPERTIES {table}").collect()}
    constraint = properties.get(_VECTOR_LENGTH)
    if constraint is None:
        first = spark.table(table).select(F.size("embedding")).first()
        constraint = _of_length(first[0] if first else length)
    if constraint != _of_length(length):
        found = constraint.removeprefix("size(embedding) = ")
        raise ConfigError(f"{table} has vectors of {found} numbers, but this model's have {length}: use another table")


def _properties(vector_length: int) -> str:
    return f"'delta.enableChangeDataFeed' = 'true', '{_VECTOR_LENGTH}' = '{_of_length(vector_length)}'"


def _of_length(length: int) -> str:
    return f"size(embedding) = {length}"


def _found_in_warehouse(spark: SparkSession, table: str) -> bool:
    """Register a table of the warehouse folder that an earlier local session wrote; return whether it was found.

    Local Spark keeps its catalog in memory, so names are lost when it stops, while the warehouse folder keeps the
    tables. (Databricks and Hive catalogs are persistent.)
    """
    if delta_path(table) or not _forgets_names(spark):
        return False
    *schema, name = table.replace("`", "").split(".")
    if schema[:-1] not in ([], ["spark_catalog"]) or not all(part.isidentifier() for part in (*schema, name)):
        return False
    warehouse = Path(str(spark.conf.get("spark.sql.warehouse.dir")).removeprefix("file:"))
    folder = warehouse / (f"{schema[-1]}.db/{name}" if schema and schema[-1] != "default" else name)
    if not any((folder / "_delta_log").glob("*.json")):  # no table, or a run was killed before its first commit
        return False
    if schema:
        spark.sql(f"CREATE SCHEMA IF NOT EXISTS {schema[-1]}")
    spark.catalog.createTable(table, path=str(folder), source="delta")
    logger.info("table %s registered again from %s", table, folder)
    return True


def _forgets_names(spark: SparkSession) -> bool:
    """Return whether the session's catalog is in memory; serverless compute, where it is not, hides the setting."""
    try:
        return spark.conf.get("spark.sql.catalogImplementation") == "in-memory"
    except PySparkException as exc:
        if not is_not_supported(exc):
            raise
        return False


def delete_older(spark: SparkSession, table: str, column: str, days: int) -> int:
    """Delete the rows whose date is more than `days` before today; return their number.

    Files in which deletion vectors only hide the rows are rewritten without them.

    Raises
    ------
    ConfigError
        The table has no such column of type date or timestamp.
    """
    types = {field.name: field.dataType for field in spark.table(table).schema}
    if not isinstance(types.get(column), DateType | TimestampType | TimestampNTZType):
        dates = [name for name, kind in types.items() if isinstance(kind, DateType | TimestampType | TimestampNTZType)]
        end = suggestion(column, dates, label="its date and timestamp columns")
        raise ConfigError(f"{table} has no date or timestamp column {column!r}{end}")
    deleted = spark.sql(f"DELETE FROM {table} WHERE {identifier(column)} < date_sub(current_date(), {days})")
    spark.sql(f"REORG TABLE {table} APPLY (PURGE)")
    return deleted.first()["num_affected_rows"]  # type: ignore[index]


def delete_finished_runs(spark: SparkSession, table: str, days: int) -> int:
    """Delete the records of runs that finished more than `days` before today; return their number.

    Runs that failed or were killed stay: they may have left embeddings that later runs replace by their run_id. Runs
    whose embeddings or ledger lines still exist stay too: by these records, `embed` finds what to remove when a row
    disappears from the input.
    """
    old = f"status = 'finished' AND finished_at < date_sub(current_date(), {days})"
    outputs = [row[0] for row in spark.table(table).where(old).select("output_table").distinct().collect() if row[0]]
    written = [name for output in outputs for name in (output, beside(output, "_ledger")) if exists(spark, name)]
    needed = {row[0] for name in written for row in spark.table(name).select("run_id").distinct().collect() if row[0]}
    if needed:
        old += f" AND run_id NOT IN ({', '.join(map(literal, sorted(needed)))})"
    deleted = _retried(table, lambda: spark.sql(f"DELETE FROM {table} WHERE {old}"))
    return deleted.first()["num_affected_rows"]  # type: ignore[index]


def is_vacuumed_by_databricks(spark: SparkSession, table: str) -> bool:
    """Return whether predictive optimization is on for a table: Databricks then runs VACUUM by itself."""
    described = spark.sql(f"DESCRIBE TABLE EXTENDED {table}").collect()
    return any(
        line["col_name"] == "Predictive Optimization" and (line["data_type"] or "").startswith("ENABLE")
        for line in described
    )


def delete_versions(spark: SparkSession, table: str, model: str, versions: Sequence[str]) -> None:
    """Delete the rows of some versions of a model, in one commit."""
    gone = f"model_name = {literal(model)} AND model_version IN ({', '.join(map(literal, versions))})"
    _retried(table, lambda: spark.sql(f"DELETE FROM {table} WHERE {gone}"))


def cluster(spark: SparkSession, table: str, column: str) -> None:
    """Cluster a table by a column, so that equal values are in the same files (liquid clustering).

    Unlike with Z-order, OPTIMIZE then rewrites new files only, not the whole table.

    Raises
    ------
    ConfigError
        The column does not exist, or the table cannot be clustered by it.
    """
    (detail,) = spark.sql(f"DESCRIBE DETAIL {table}").collect()
    if detail["clusteringColumns"] in ([column], [_quoted(column)]):  # Delta quotes names that are no identifiers
        return
    try:
        spark.sql(f"ALTER TABLE {table} CLUSTER BY ({identifier(column)})")
    except AnalysisException as exc:
        end = did_you_mean(column, spark.table(table).columns) or f": {str(exc).splitlines()[0]}"
        raise ConfigError(f"cannot cluster {table} by {column!r}{end}") from exc


def compact(spark: SparkSession, table: str) -> tuple[int, int]:
    """Compact small files (and cluster, if the table is clustered); return how many were removed and added."""
    metrics = spark.sql(f"OPTIMIZE {table}").first()["metrics"]  # type: ignore[index]
    return metrics["numFilesRemoved"], metrics["numFilesAdded"]


def vacuum(spark: SparkSession, table: str, hours: int, *, unsafe: bool = False) -> int | None:
    """Remove files that no version of the last `hours` needs; return how many, None if the history does not say.

    Delta rejects fewer hours than the table's retention (a week) unless `unsafe`: running readers and writers may need
    the files.
    """
    with _any_retention(spark) if unsafe else nullcontext():
        spark.sql(f"VACUUM {table} RETAIN {hours} HOURS")
    last = _newest(spark, table)
    return int(last["operationMetrics"]["numDeletedFiles"]) if last["operation"] == "VACUUM END" else None


@contextmanager
def _any_retention(spark: SparkSession) -> Iterator[None]:
    """Switch off Delta's check that VACUUM keeps a week."""
    check = "spark.databricks.delta.retentionDurationCheck.enabled"
    try:
        before = spark.conf.get(check, "true") or "true"
        spark.conf.set(check, "false")
    except PySparkException as exc:
        if not is_not_supported(exc):
            raise
        raise ConfigError(
            f"--vacuum-hours below a week needs a classic dedicated cluster: this compute does not allow the setting "
            f"{check} ({in_one_line(exc)}); use --vacuum-hours 168"
        ) from exc
    try:
        yield
    finally:
        spark.conf.set(check, before)

"""The package's Delta tables: their columns, and the only code that reads and writes Delta.

All of it is SQL and DataFrames, so that it runs the same under Spark Connect.
"""

import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar
from uuid import uuid4

from pyspark.errors import AnalysisException
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

from scgpt_batch.errors import ConfigError, ScgptBatchError, in_one_line
from scgpt_batch.io.rows import PAYLOAD_COLUMNS
from scgpt_batch.spark.errors import is_conflict, is_folder_refused, is_location_taken

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
    embedded_at TIMESTAMP, package_version STRING
"""
GENE_EMBEDDINGS = f"adata_id STRING, `group` STRING, gene STRING, embedding ARRAY<FLOAT>, n_cells INT, {_STAMPS}"
CELL_EMBEDDINGS = f"adata_id STRING, cell_id STRING, embedding ARRAY<FLOAT>, {_STAMPS}"
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
    output_version BIGINT, package_version STRING, rows_removed BIGINT
"""

FILES = """
    path STRING, status STRING, layer STRING, notes ARRAY<STRING>, rows BIGINT, cells BIGINT, error_class STRING,
    error_message STRING, fingerprint STRING, rows_digest BIGINT, package_version STRING, at TIMESTAMP
"""

# Without these a table is another's. A column of ours that is not among them is added to a table that lacks it.
IDENTITY = {
    "adata_id", "group", "gene", "cell_id", "embedding", "mode", "model_name", "model_version", "params_hash", "run_id",
    "status", "x_data", "adata_obs", "adata_var",
}  # fmt: skip

_CHECK = "spark.databricks.delta.replaceWhere.constraintCheck.enabled"
_CHECK_IS_OURS = Lock()  # runs in threads of one session share its settings
_VECTOR_LENGTH = "delta.constraints.vector_length"

_ANOTHER_SOURCE = "row of another source"  # raised in SQL, and found in the error's text

COMMIT_TRIES = 12  # over some four minutes
CREATE_TRIES = 4  # over some seven seconds: another run makes the table at most once

# what may be in the way; Hadoop's file systems keep the reason to themselves
_NO_FOLDER = "No space left, a Read-only file system, no permission, or a file where a folder should be"


class FolderTaken(ConfigError):
    """A table's folder holds files that are not a Delta table; another run may be creating the table."""


_PATH = re.compile(r"delta\.`(?P<path>[^`]+)`")
_NAME = re.compile(r"(`[^`]+`|\w+)(\.(`[^`]+`|\w+)){0,2}")


class RowOfAnotherSource(ConfigError):
    """A new row has the key of a row that another file gave."""


def table_name(given: str) -> str:
    """Check a table's spelling: a name of one to three parts, or delta.`path`; a local path becomes absolute.

    Raises
    ------
    ConfigError
        It is neither, or contains `${`, which Spark replaces in SQL text.
    """
    if "${" in given:
        raise ConfigError(f"table {given!r} contains ${{...}}, which Spark replaces in SQL: rename the table or folder")
    if match := _PATH.fullmatch(given.strip()):
        path = match["path"]
        return f"delta.`{path if '://' in path or path.startswith('dbfs:') else Path(path).absolute()}`"
    if _NAME.fullmatch(given.strip()):
        return given.strip()
    raise ConfigError(f"{given!r} is no table: use catalog.schema.table or delta.`path`")


def beside(table: str, suffix: str) -> str:
    """Name the table that stands beside another: `suffix` goes to its name or path."""
    return f"{table[:-1].rstrip('/')}{suffix}`" if table.endswith("`") else f"{table}{suffix}"


def exists(spark: SparkSession, table: str) -> bool:
    """Tell whether there is a Delta table of this name or path."""
    try:
        if spark.catalog.tableExists(table):
            return True
        spark.sql(f"DESCRIBE DETAIL {table}").collect()
        return True
    except AnalysisException:
        return _found_in_warehouse(spark, table)


def read(spark: SparkSession, table: str, columns: str, *, version: int | None = None) -> DataFrame:
    """Read a table or view with at least `columns` (DDL): those it lacks are null, further ones are carried along.

    Names are found whatever their case and get ours. `version` None reads the newest snapshot.

    Raises
    ------
    ConfigError
        There is no such table, it has no `adata_id`, or a column's type cannot be read as ours.
    """
    if not exists(spark, table):
        raise ConfigError(f"no table {table}")
    rows = spark.table(table) if version is None else spark.sql(f"SELECT * FROM {table} VERSION AS OF {version}")
    return _completed(rows, table, columns)


def read_stream(spark: SparkSession, table: str, columns: str) -> DataFrame:
    """Read a table as a stream with at least `columns`; rows of files that an update has rewritten come again."""
    reader = spark.readStream.format("delta").option("ignoreChanges", "true")
    path = _PATH.fullmatch(table)
    return _completed(reader.load(path["path"]) if path else reader.table(table), table, columns)


def _completed(rows: DataFrame, table: str, columns: str) -> DataFrame:
    wanted = {field.name.lower(): field for field in _fields(rows.sparkSession, columns)}
    held = {field.name.lower(): field for field in rows.schema}
    if "adata_id" in wanted and "adata_id" not in held:
        raise ConfigError(f"{table} has no column adata_id: each row needs a key")
    taken = []
    for name, field in held.items():
        column = F.col(_quoted(field.name))
        if name in wanted:
            column = _as_ours(column, field.dataType, wanted[name].dataType, f"{table}: column {field.name}")
        taken.append(column.alias(wanted[name].name if name in wanted else field.name))
    lacking = [F.lit(None).cast(field.dataType).alias(field.name) for name, field in wanted.items() if name not in held]
    return rows.select(*taken, *lacking)


def create(spark: SparkSession, table: str, columns: str, *, vector_length: int | None = None) -> None:
    """Create a table with these columns unless it is there.

    A table that is there gets those columns which newer versions of this package added. With `vector_length` the
    table takes vectors of that length only, and keeps a change feed, so that a search index can follow it.

    Raises
    ------
    ConfigError
        A table of this name is another's, or holds vectors of another length, or its folder holds other files;
        nothing was changed.
    ScgptBatchError
        Its file system cannot be written.
    """
    if exists(spark, table):
        _adapt(spark, table, columns, vector_length)
        return
    schema = table.rsplit(".", 1)[0] if not _PATH.fullmatch(table) and "." in table else None
    # Unity Catalog checks the right to create schemas before it looks whether the schema exists
    if schema and not spark.catalog.databaseExists(schema):
        spark.sql(f"CREATE SCHEMA IF NOT EXISTS {schema}")
    promises = "" if vector_length is None else f"TBLPROPERTIES ({_promises(vector_length)})"
    statement = f"CREATE TABLE IF NOT EXISTS {table} ({columns}) USING delta {promises}"
    _retried(table, lambda: _make(spark, table, statement), tries=CREATE_TRIES)


def _make(spark: SparkSession, table: str, statement: str) -> None:
    """Make the table and look that it is there.

    Between the folder of another run's table and its first commit Delta says either that the place is taken, or, asked
    to make a table at a path, that it is made. A run that was killed there looks the same, until one has waited.
    """
    try:
        spark.sql(statement)
    except Exception as exc:  # an error of Java's file systems has no class of its own here
        if is_folder_refused(exc):
            raise ScgptBatchError(f"cannot make the folder of {table}: {_NO_FOLDER}") from exc
        if not is_location_taken(exc):
            raise
    if not exists(spark, table):
        raise FolderTaken(
            f"cannot create table {table}: its folder holds files that are not a Delta table. Name another table; if a "
            "run was killed while it created this one, remove the folder"
        )


def replace(rows: DataFrame, table: str, condition: Callable[[], str]) -> None:
    """Write rows in place of those that meet `condition`, in one commit; the rows must all meet it.

    Writing the same again changes nothing. Of two at once on one table the later to commit is refused by Delta and
    tries again, so it sees what the first has written; `condition` is asked anew for each try. Threads of one process
    write one after the other.
    """
    writer = rows.write.format("delta").mode("overwrite").option("compression", "zstd")
    with _CHECK_IS_OURS, _lines_unchecked(rows.sparkSession):
        _retried(table, lambda: writer.option("replaceWhere", condition()).saveAsTable(table))


@contextmanager
def _lines_unchecked(spark: SparkSession) -> Iterator[None]:
    """Keep Delta from asking of each line that is written whether it meets `replaceWhere`.

    It compares one after the other with each of a wave's thousands of keys, which takes longer than all other work on
    small rows. Where the setting may not be touched (Databricks serverless), it goes on doing so.
    """
    before = spark.conf.get(_CHECK, None)
    try:
        spark.conf.set(_CHECK, "false")
    except AnalysisException as exc:
        logger.info("%s stays as it is, waves of many small rows are written slower: %s", _CHECK, in_one_line(exc))
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
    """Delete the lines of some runs that agree with one of `lines` on all of its columns, in one commit.

    Parameters
    ----------
    lines
        Distinct, without nulls.
    """
    same = [f"t.{identifier(name)} = s.{identifier(name)}" for name in lines.columns]
    written = f"t.run_id IN ({', '.join(map(literal, runs))})"
    _merge(lines.sparkSession, table, lines, f"{' AND '.join([*same, written])} WHEN MATCHED THEN DELETE")


def insert(spark: SparkSession, table: str, values: Mapping[str, str | float | datetime]) -> None:
    """Add one row, by SQL alone: no Python worker that could be lost. Columns not named are null."""
    spelt = ", ".join(map(literal, values.values()))
    _retried(table, lambda: spark.sql(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({spelt})"))


def update(spark: SparkSession, table: str, values: Mapping[str, str | float | datetime], condition: str) -> None:
    """Set columns of the rows that meet `condition`, in one commit."""
    told = ", ".join(f"{name} = {literal(value)}" for name, value in values.items())
    _retried(table, lambda: spark.sql(f"UPDATE {table} SET {told} WHERE {condition}"))


def literal(value: str | float | datetime) -> str:
    """Return a string, a number or a time (with its zone) as an SQL literal.

    A string is the same whatever the session's settings: Spark replaces `${name}` in SQL text, and takes backslashes
    for escapes or not. Strings with such characters are therefore written as bytes.
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
        raise ConfigError(f"column {name!r} cannot be named in SQL: Spark replaces ${{...}}; rename the column")
    return _quoted(name)


def _quoted(name: str) -> str:
    return f"`{name.replace('`', '``')}`"


def _retried(table: str, write: Callable[[], Written], *, tries: int = COMMIT_TRIES) -> Written:
    """Commit, again when another writer of the table was faster; return what the commit returns."""
    for attempt in range(tries):
        try:
            return write()
        except Exception as exc:  # py4j and Connect have different types for Delta's refusals
            if attempt + 1 == tries or not (is_conflict(exc) or isinstance(exc, FolderTaken)):
                raise
            seconds = random.uniform(0.5, 1.5) * 2 ** min(attempt, 5)
            logger.info("%s: another writer was faster; again in %.0f s", table, seconds)
            time.sleep(seconds)
    raise AssertionError("unreachable")


def upsert_rows(spark: SparkSession, table: str, rows: DataFrame, gone: DataFrame | None = None) -> tuple[int, int]:
    """Insert AnnData rows that are new, replace those whose content or sample changed, delete those that are gone.

    All in one commit.

    Parameters
    ----------
    gone
        The `adata_id` of rows to delete.

    Returns
    -------
    How many rows were inserted or replaced, and how many deleted.

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
    except Exception as exc:  # py4j and Connect have different types for what SQL raises
        if f"[USER_RAISED_EXCEPTION] {_ANOTHER_SOURCE}" in str(exc):
            raise RowOfAnotherSource(f"{table}: a new row has the adata_id of a row of another file") from exc
        raise
    return merged["num_inserted_rows"] + merged["num_updated_rows"], merged["num_deleted_rows"]


def append(spark: SparkSession, table: str, columns: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Add lines to a table, in one commit. Columns not named are null."""
    schema = _fields(spark, columns)
    rows = spark.createDataFrame([tuple(line.get(field.name) for field in schema) for line in lines], schema)
    _retried(table, lambda: rows.write.format("delta").mode("append").saveAsTable(table))


def _merge(spark: SparkSession, table: str, rows: DataFrame, clauses: str) -> Row:
    """Merge rows (`s`) into a table (`t`) in one commit; return Delta's counts of changed rows."""
    view = f"_scgpt_{uuid4().hex}"
    rows.createOrReplaceTempView(view)
    try:
        merged = _retried(table, lambda: spark.sql(f"MERGE INTO {table} t USING {view} s ON {clauses}"))
        counts = merged.first()
        assert counts is not None  # MERGE answers with one row
        return counts
    finally:
        spark.catalog.dropTempView(view)


def version(spark: SparkSession, table: str) -> int:
    """Return the newest version of a Delta table."""
    return _newest(spark, table)["version"]


def snapshot(spark: SparkSession, table: str) -> int | None:
    """Return the newest version of a table to read at; None for a view or a table of another format."""
    try:
        return version(spark, table)
    except AnalysisException:
        return None


def _newest(spark: SparkSession, table: str) -> Row:
    """Return what the table's log says of its newest version."""
    newest = spark.sql(f"DESCRIBE HISTORY {table} LIMIT 1").first()
    assert newest is not None  # a table has a version
    return newest


def row_hash() -> Column:
    """A row's content hash: what its `content_hash` says, else computed."""
    return F.coalesce("content_hash", content_hash())


def content_hash() -> Column:
    """Hash what decides a row's result, but for its sample: payload, x_dtype and shape.

    128 bits as 32 hexadecimal digits, computed in the JVM without touching Python. Null columns change nothing.
    """
    payload = [F.col(name) for name in (*PAYLOAD_COLUMNS, "x_dtype", "n_obs", "n_vars")]
    halves = [F.lpad(F.lower(F.hex(F.xxhash64(F.lit(seed), *payload))), 16, "0") for seed in (0, 1)]
    return F.concat(*halves)


def _fields(spark: SparkSession, columns: str) -> StructType:
    return spark.createDataFrame([], columns).schema


def _as_ours(column: Column, have: DataType, want: DataType, where: str) -> Column:
    """Take a column whose type is of the same kind as ours; whole numbers are fine keys, dates are fine times."""
    if have == want or _same_kind(have, want):
        return column
    if isinstance(want, TimestampType) and isinstance(have, TimestampNTZType | DateType):
        return column.cast(want)
    if isinstance(want, StringType) and isinstance(have, NumericType):
        return column.cast(want)
    raise ConfigError(f"{where} is {have.simpleString()}, {want.simpleString()} is needed")


def _same_kind(have: DataType, want: DataType) -> bool:
    if isinstance(have, ArrayType) and isinstance(want, ArrayType):
        return _same_kind(have.elementType, want.elementType)
    return any(isinstance(have, kind) and isinstance(want, kind) for kind in (NumericType, StringType))


def _adapt(spark: SparkSession, table: str, columns: str, vector_length: int | None) -> None:
    """Add the columns that a table of ours lacks, after looking that it is one and takes such vectors."""
    have = {field.name.lower(): field.dataType for field in spark.table(table).schema}
    wanted = _fields(spark, columns)
    wrong = [f for f in wanted if have.get(f.name.lower(), None if f.name in IDENTITY else f.dataType) != f.dataType]
    if wrong:
        told = ", ".join(f"{field.name} {field.dataType.simpleString()}" for field in wrong)
        raise ConfigError(f"{table} is not a table of ours: it lacks {told}; name another")
    if vector_length is not None:
        _check_vector_length(spark, table, vector_length)
    new = [field for field in wanted if field.name.lower() not in have]
    if new:
        told = ", ".join(f"`{field.name}` {field.dataType.simpleString()}" for field in new)
        spark.sql(f"ALTER TABLE {table} ADD COLUMNS ({told})")
        logger.info("%s: columns added: %s", table, told)


def _check_vector_length(spark: SparkSession, table: str, length: int) -> None:
    """Refuse a table of longer or shorter vectors: by its constraint, or by its first vector where it has none."""
    properties = {row["key"]: row["value"] for row in spark.sql(f"SHOW TBLPROPERTIES {table}").collect()}
    held = properties.get(_VECTOR_LENGTH)
    if held is None:
        first = spark.table(table).select(F.size("embedding")).first()
        held = _of_length(first[0] if first else length)
    if held != _of_length(length):
        raise ConfigError(
            f"{table} takes vectors of one length ({held}) and this model's have {length} numbers: name another table"
        )


def _promises(vector_length: int) -> str:
    return f"'delta.enableChangeDataFeed' = 'true', '{_VECTOR_LENGTH}' = '{_of_length(vector_length)}'"


def _of_length(length: int) -> str:
    return f"size(embedding) = {length}"


def _found_in_warehouse(spark: SparkSession, table: str) -> bool:
    """Give a table its name back that an earlier local session wrote.

    The catalog of local Spark lives in memory and forgets names when Spark stops; the warehouse folder keeps the
    tables. (Databricks and Hive catalogs do not forget.)
    """
    if _PATH.fullmatch(table) or spark.conf.get("spark.sql.catalogImplementation") != "in-memory":
        return False
    *schema, name = table.replace("`", "").split(".")
    if schema[:-1] not in ([], ["spark_catalog"]) or not all(part.isidentifier() for part in (*schema, name)):
        return False
    warehouse = Path(str(spark.conf.get("spark.sql.warehouse.dir")).removeprefix("file:"))
    folder = warehouse / (f"{schema[-1]}.db/{name}" if schema and schema[-1] != "default" else name)
    if not any((folder / "_delta_log").glob("*.json")):  # none of it, or killed before its first commit
        return False
    if schema:
        spark.sql(f"CREATE SCHEMA IF NOT EXISTS {schema[-1]}")
    spark.catalog.createTable(table, path=str(folder), source="delta")
    logger.info("%s: found again in %s", table, folder)
    return True


def delete_older(spark: SparkSession, table: str, column: str, days: int) -> int:
    """Delete the rows whose date lies more than `days` before today; return how many that were.

    They are also gone from the newest files: where deletion vectors only hide them, the files are written anew.

    Raises
    ------
    ConfigError
        The table has no such column of dates or times.
    """
    types = {field.name: field.dataType for field in spark.table(table).schema}
    if not isinstance(types.get(column), DateType | TimestampType | TimestampNTZType):
        raise ConfigError(f"{table} has no column {column!r} of dates or times: rows older than what?")
    deleted = spark.sql(f"DELETE FROM {table} WHERE {identifier(column)} < date_sub(current_date(), {days})")
    spark.sql(f"REORG TABLE {table} APPLY (PURGE)")
    return deleted.first()["num_affected_rows"]  # type: ignore[index]


def delete_versions(spark: SparkSession, table: str, model: str, versions: Sequence[str]) -> None:
    """Delete the lines of some versions of a model, in one commit."""
    gone = f"model_name = {literal(model)} AND model_version IN ({', '.join(map(literal, versions))})"
    _retried(table, lambda: spark.sql(f"DELETE FROM {table} WHERE {gone}"))


def cluster(spark: SparkSession, table: str, column: str) -> None:
    """Have Delta keep equal values of a column in the same files (liquid clustering).

    Unlike Z-order, which writes the whole table again at each OPTIMIZE, that then touches new files only.

    Raises
    ------
    ConfigError
        The table has no such column, or cannot be clustered by it.
    """
    (detail,) = spark.sql(f"DESCRIBE DETAIL {table}").collect()
    if detail["clusteringColumns"] == [column]:
        return
    try:
        spark.sql(f"ALTER TABLE {table} CLUSTER BY ({identifier(column)})")
    except AnalysisException as exc:
        raise ConfigError(f"{table} cannot be clustered by {column!r}: {str(exc).splitlines()[0]}") from exc


def compact(spark: SparkSession, table: str) -> tuple[int, int]:
    """Write small files together (and cluster, where the table says how); return how many were removed and added."""
    metrics = spark.sql(f"OPTIMIZE {table}").first()["metrics"]  # type: ignore[index]
    return metrics["numFilesRemoved"], metrics["numFilesAdded"]


def vacuum(spark: SparkSession, table: str, hours: int, *, unsafe: bool = False) -> int | None:
    """Remove the files that no version of the last `hours` needs; return how many, None if the table's log is silent.

    Delta refuses fewer hours than the table's retention (a week) unless `unsafe`: a reader or writer at work may need
    the files.
    """
    check = "spark.databricks.delta.retentionDurationCheck.enabled"
    before = spark.conf.get(check, "true") or "true"
    try:
        if unsafe:
            spark.conf.set(check, "false")
        spark.sql(f"VACUUM {table} RETAIN {hours} HOURS")
    finally:
        if unsafe:
            spark.conf.set(check, before)
    last = _newest(spark, table)
    return int(last["operationMetrics"]["numDeletedFiles"]) if last["operation"] == "VACUUM END" else None

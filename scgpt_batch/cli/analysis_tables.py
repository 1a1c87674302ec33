"""Tables that the analysis commands read and write: at a path through delta-rs without Spark, by name through Spark."""

import json
import logging
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc

import scgpt_batch
from scgpt_batch.embedding_tables import (
    MODEL,
    EmbeddingLines,
    Embeddings,
    described_model,
    load_embeddings,
    newest_embeddings,
    open_lines,
)
from scgpt_batch.errors import ConfigError, EmbeddingWarning, ScgptBatchError, install, listed, suggestion
from scgpt_batch.io.delta import open_dataset, open_table, table_path
from scgpt_batch.io.locations import beside, table_name

logger = logging.getLogger(__name__)

_TEXT, _REAL, _INT = pa.string(), pa.float64(), pa.int32()
# What the lines were made of: the vectors' model, the table that holds them, and the command's own settings
_MADE_OF = [
    *((name, _TEXT) for name in MODEL), ("source_table", _TEXT), ("source_version", pa.int64()), ("run_id", _TEXT),
    ("params", _TEXT), ("written_at", pa.timestamp("us", "UTC")), ("package_version", _TEXT),
]  # fmt: skip
GENE_PROGRAMS = pa.schema(
    [("program", _TEXT), ("gene", _TEXT), ("rank", _INT), ("stability", _REAL), ("group", _TEXT), *_MADE_OF]
)
PROGRAM_SCORES = pa.schema(
    [("adata_id", _TEXT), ("cell_id", _TEXT), ("group", _TEXT), ("program", _TEXT), ("score", _REAL), *_MADE_OF]
)
PROGRAM_ENRICHMENT = pa.schema([
    ("program", _TEXT), ("term", _TEXT), ("genes", pa.list_(_TEXT)), ("term_genes", _INT), ("p_value", _REAL),
    ("p_adjusted", _REAL), ("group", _TEXT), *_MADE_OF,
])  # fmt: skip
ANNOTATIONS = pa.schema([
    ("adata_id", _TEXT), ("cell_id", _TEXT), ("label", _TEXT), ("confidence", _REAL), ("label_weighted", _TEXT),
    ("confidence_weighted", _REAL), ("neighbours", pa.list_(_TEXT)), ("distances", pa.list_(pa.float32())), *_MADE_OF,
    ("reference_table", _TEXT), ("reference_version", pa.int64()), ("labels", _TEXT), ("label_column", _TEXT),
])  # fmt: skip
EVALUATIONS = pa.schema(
    [("metric", _TEXT), ("value", _REAL), ("baseline", _REAL), ("labels", _TEXT), ("label_column", _TEXT), *_MADE_OF]
)

BATCH_LINES = 65_536
PAYLOAD_LINES = 32  # rows of cells that are read at a time: each may be megabytes
COMMIT_TRIES = 6  # over about a minute

Loaded = TypeVar("Loaded", Embeddings, EmbeddingLines)


@dataclass(frozen=True)
class AnalysisTables:
    """Reads and writes tables; starts Spark when the first table is given by name.

    All readings of a table are of the version that was the newest at the first of them, so that they agree with each
    other and with the version in the results, whatever others write meanwhile.

    Attributes
    ----------
    spark_conf
        Settings of a local Spark session.
    run_id
        Of the lines that this command writes.
    """

    spark_conf: Mapping[str, str]
    run_id: str = field(default_factory=lambda: uuid4().hex)
    _versions: dict[str, int | None] = field(default_factory=dict)

    def session(self) -> Any:
        """Return the Spark session."""
        try:
            from scgpt_batch.spark.session import get_spark
        except ModuleNotFoundError as exc:
            raise ConfigError(
                f"a table given by name needs Spark, and {exc.name} is not installed: {install('local')}; or give "
                "tables as delta.`path`"
            ) from exc
        return get_spark(self.spark_conf)

    def full_name(self, table: str) -> str:
        """Return the table as it is stored in other tables: a local path is made absolute."""
        path = table_path(table)
        if path is None:
            return table_name(table)
        return f"delta.`{path if '://' in path else Path(path).absolute()}`"

    def beside(self, table: str, suffix: str) -> str:
        """Return the full name of a table's companion."""
        return beside(self.full_name(table), suffix)

    def embeddings(self, table: str, **choice: str) -> Embeddings:
        """Load the vectors of the model that wrote last, or of the chosen mode and version, in order of their keys."""
        load = partial(load_embeddings, table, version=self.version(table), **_chosen(choice))
        return self._reported(load).in_order()

    def static_lines(self, table: str, model_version: str) -> Embeddings | EmbeddingLines:
        """Open lines of static vectors. Of a named table, only one line of each gene is brought to the driver."""
        if table_path(table) is not None:
            return self.lines(table, mode="static", model_version=model_version)
        from pyspark.sql import functions as F

        given = {"mode": "static"} | ({"model_version": model_version} if model_version else {})
        lines = self._named(table)
        for name, value in given.items():
            lines = lines.where(lines[name] == value)
        one = lines.groupBy(*MODEL, "gene").agg(
            F.lit("").alias("adata_id"), F.lit(None).cast("string").alias("group"),
            F.first("embedding").alias("embedding"), F.max("embedded_at").alias("embedded_at"),
        )  # fmt: skip
        return self._reported(lambda: newest_embeddings(one.toArrow(), table, given))

    def lines(self, table: str, **choice: str) -> EmbeddingLines:
        """Open a table at a path as `embeddings`, to read its vectors block by block."""
        return self._reported(partial(open_lines, table, version=self.version(table), **_chosen(choice)))

    def read(self, table: str, columns: Sequence[str]) -> pa.Table:
        """Read columns of a table."""
        if table_path(table) is not None:
            return self._dataset(table).to_table(columns=list(columns))
        return self._named(table).select(*columns).toArrow()

    def batches(self, table: str, columns: Sequence[str], adata_ids: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Read the lines of some rows, a few at a time."""
        if table_path(table) is not None:
            yield from self._dataset(table).to_batches(
                columns=list(columns), filter=pc.field("adata_id").isin(list(adata_ids)), batch_size=PAYLOAD_LINES,
                batch_readahead=1, fragment_readahead=1,
            )  # fmt: skip
            return
        lines = self._named(table).select(*columns)
        for first in range(0, len(adata_ids), PAYLOAD_LINES):
            some = list(adata_ids[first : first + PAYLOAD_LINES])
            yield from lines.where(lines["adata_id"].isin(some)).toArrow().to_batches()

    def columns(self, table: str) -> list[str]:
        """Return the names of a table's columns."""
        return self._named(table).columns if table_path(table) is None else self._dataset(table).schema.names

    def values(self, table: str, column: str) -> list[Any]:
        """Return the distinct values of a column."""
        if table_path(table) is None:
            return [row[0] for row in self._named(table).select(column).distinct().collect()]
        batches = self._dataset(table).to_batches(columns=[column])
        return list(dict.fromkeys(value for batch in batches for value in pc.unique(batch.column(0)).to_pylist()))

    def version(self, table: str) -> int | None:
        """Return the version of a Delta table that is read; None for a view.

        Raises
        ------
        ConfigError
            There is no such table.
        """
        if table not in self._versions:
            path = table_path(table)
            self._versions[table] = int(open_table(path).version()) if path is not None else self._newest(table)
        return self._versions[table]

    def made_of(self, table: str, model: Mapping[str, str], params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns that say what lines were made of."""
        return {name: model[name] for name in MODEL} | {
            "source_table": self.full_name(table), "source_version": self.version(table), "run_id": self.run_id,
            "params": json.dumps(params, sort_keys=True), "written_at": datetime.now(UTC),
            "package_version": scgpt_batch.__version__,
        }  # fmt: skip

    def replace(
        self,
        table: str,
        schema: pa.Schema,
        rows: pa.Table,
        constants: Mapping[str, Any],
        keys: Sequence[str] = (*MODEL, "source_table"),
    ) -> None:
        """Replace the lines with the same keys, in one commit; create the table if it does not exist.

        Parameters
        ----------
        rows
            The columns that differ between lines.
        constants
            The others: column -> value.
        keys
            Text columns of `constants`; lines of the table with the same values are replaced.
        """
        where = " AND ".join(f"{name} = {_quoted(str(constants[name]))}" for name in keys)
        path = table_path(table)
        if path is None:
            self._replace_by_name(table, schema, rows, constants, keys)
        else:
            _replace_at_path(path, schema, rows, constants, where)
        logger.info("%s: %s lines written", table, f"{rows.num_rows:,}")

    def _replace_by_name(
        self, table: str, schema: pa.Schema, rows: pa.Table, constants: Mapping[str, Any], keys: Sequence[str]
    ) -> None:
        from scgpt_batch.spark import tables

        spark = self.session()
        tables.create(spark, table, ddl(schema))
        where = " AND ".join(f"{name} = {tables.literal(str(constants[name]))}" for name in keys)
        complete = pa.Table.from_batches(_completed(schema, rows, constants), schema)
        tables.replace(spark.createDataFrame(complete), table, lambda: where)

    def _newest(self, table: str) -> int | None:
        """Return the newest version of a named table; None for a view."""
        spark = self.session()
        from scgpt_batch.spark import tables

        if not tables.exists(spark, tables.table_name(table)):
            raise tables.missing_table(spark, table)
        snapshot = tables.snapshot(spark, table)
        return None if snapshot is None else snapshot.version

    def _named(self, table: str) -> Any:
        """Return a named table's DataFrame."""
        version = self.version(table)
        spark = self.session()
        from scgpt_batch.spark import tables

        return tables.at_version(spark, table, version)

    def _dataset(self, table: str) -> Any:
        """Return the dataset of a table at a path."""
        return open_dataset(table_path(table) or table, self.version(table))

    @staticmethod
    def _reported(load: Callable[[], Loaded]) -> Loaded:
        """Load embeddings; log warnings, what is read, and what else the table holds."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", EmbeddingWarning)
            found = load()
        for warning in caught:
            logger.warning("%s", warning.message)
        logger.info("%s: %s", found.source, described_model(found.model))
        if found.other_models:
            logger.warning(
                "%s also has %s, which are not read: the model that wrote last is used by default; --model-version "
                "chooses another",
                found.source, listed(found.other_models).replace("'", ""),
            )  # fmt: skip
        return found


def check_column(column: str, columns: Sequence[str], where: str) -> None:
    """Raise a ConfigError if a table or file lacks a column."""
    if column not in columns:
        raise ConfigError(f"{where} has no column {column!r}{suggestion(column, columns, label='its columns')}")


def one_mode(modes: Iterable[str], table: str) -> str:
    """Return the mode of a table's vectors.

    Raises
    ------
    ConfigError
        There are several, or none because the table is empty.
    """
    found = sorted(set(modes))
    if not found:
        raise ConfigError(f"{table} has no embeddings")
    if len(found) > 1:
        raise ConfigError(f"{table} has vectors of the modes {listed(found)}: choose one with --mode")
    return found[0]


def ddl(schema: pa.Schema) -> str:
    """Return a schema as Spark's column definitions.

    >>> ddl(pa.schema([("group", pa.string()), ("distances", pa.list_(pa.float32()))]))
    '`group` STRING, `distances` ARRAY<FLOAT>'
    """
    return ", ".join(f"`{column.name}` {_spark_type(column.type)}" for column in schema)


def _spark_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"ARRAY<{_spark_type(kind.value_type)}>"
    if pa.types.is_timestamp(kind):
        return "TIMESTAMP"
    return {_TEXT: "STRING", _REAL: "DOUBLE", pa.float32(): "FLOAT", _INT: "INT", pa.int64(): "BIGINT"}[kind]


def _chosen(choice: Mapping[str, str]) -> dict[str, str | None]:
    return {name: value or None for name, value in choice.items()}


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _completed(schema: pa.Schema, rows: pa.Table, constants: Mapping[str, Any]) -> Iterator[pa.RecordBatch]:
    """Yield the rows with all columns of the schema."""
    for batch in rows.to_batches(max_chunksize=BATCH_LINES):
        columns = [
            batch.column(column.name).cast(column.type)
            if column.name in rows.column_names
            else pa.array([constants[column.name]], column.type).take(pa.array([0] * batch.num_rows, pa.int32()))
            for column in schema
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _replace_at_path(path: str, schema: pa.Schema, rows: pa.Table, constants: Mapping[str, Any], where: str) -> None:
    try:
        from deltalake import DeltaTable, write_deltalake
        from deltalake.exceptions import CommitFailedError, DeltaError
    except ModuleNotFoundError as exc:
        raise ConfigError(f"writing Delta without Spark needs {exc.name}: pip install deltalake") from exc
    for attempt in range(COMMIT_TRIES):
        try:
            DeltaTable.create(path, schema, mode="ignore")
            _check_columns(path, open_dataset(path).schema.names, schema)
            reader = pa.RecordBatchReader.from_batches(schema, _completed(schema, rows, constants))
            write_deltalake(path, reader, mode="overwrite", predicate=where)
        except CommitFailedError as exc:  # another writer was faster
            if attempt + 1 == COMMIT_TRIES:
                raise ScgptBatchError(f"{path}: other writers commit all the time: {exc}") from exc
            seconds = random.uniform(0.5, 1.5) * 2**attempt
            logger.info("%s: conflict with another writer, retrying in %.0f s", path, seconds)
            time.sleep(seconds)
        except (DeltaError, OSError) as exc:
            raise ScgptBatchError(f"cannot write {path}: {str(exc).splitlines()[0]}") from exc
        else:
            return


def _check_columns(path: str, columns: Sequence[str], schema: pa.Schema) -> None:
    missing = [name for name in schema.names if name not in columns]
    if missing:
        raise ConfigError(f"{path} holds something else: it lacks the columns {', '.join(missing)}; use another table")

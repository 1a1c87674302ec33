"""`spark.read.format("anndata").load("/data/*.h5ad")`: files of counts as a Spark data source (Spark 4.0 or newer).

Options: those of `ReadOptions`, such as `cells_per_row`; `names` (JSON: the readable name of each file); `on_error`:
"raise" (default), or "record", which adds columns with what was read of each file, and returns a row with the reason
for each file that fails. Executors need access to the files, and this package.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
from pydantic import ValidationError
from pyspark.sql import SparkSession
from pyspark.sql.datasource import DataSource, DataSourceReader, InputPartition
from pyspark.sql.types import StructType

from scgpt_batch.errors import ConfigError, FileError, ScgptBatchError
from scgpt_batch.io.files import ReadOptions, Slice, plan_file, read
from scgpt_batch.io.locations import find_sources, name_sources
from scgpt_batch.io.open_file import named_errors
from scgpt_batch.parameters import validation_message

RAISE, RECORD = "raise", "record"

ROWS = pa.schema(
    [
        ("adata_id", pa.string()), ("x_data", pa.list_(pa.float32())), ("x_indices", pa.list_(pa.int32())),
        ("x_indptr", pa.list_(pa.int64())), ("n_obs", pa.int32()), ("n_vars", pa.int32()), ("adata_obs", pa.string()),
        ("adata_var", pa.string()), ("source", pa.string()), ("x_dtype", pa.string()), ("sample_id", pa.string()),
    ]
)  # fmt: skip
ROWS_DDL = """
    adata_id STRING, x_data ARRAY<FLOAT>, x_indices ARRAY<INT>, x_indptr ARRAY<BIGINT>, n_obs INT, n_vars INT,
    adata_obs STRING, adata_var STRING, source STRING, x_dtype STRING, sample_id STRING
"""
# columns added by on_error=record
REPORT = pa.schema(
    [("layer", pa.string()), ("notes", pa.list_(pa.string())), ("error_class", pa.string()),
     ("error_message", pa.string())]
)  # fmt: skip
REPORT_DDL = "layer STRING, notes ARRAY<STRING>, error_class STRING, error_message STRING"


def register(spark: SparkSession) -> None:
    """Register the format `anndata` in a session."""
    spark.dataSource.register(AnnDataSource)


class AnnDataSource(DataSource):
    """The format `anndata`: one row of `adata_rows` for up to `cells_per_row` cells of a file."""

    @classmethod
    def name(cls) -> str:
        """Return the name of the format."""
        return "anndata"

    def schema(self) -> str:
        """Return the columns: those of `adata_rows` that come from a file."""
        return f"{ROWS_DDL}, {REPORT_DDL}" if self.options.get("on_error") == RECORD else ROWS_DDL

    def reader(self, schema: StructType) -> "AnnDataReader":
        """Return the reader for the files passed to `load`."""
        return AnnDataReader(self.options)


class RowsPartition(InputPartition):
    """The parts of files that one task reads."""

    def __init__(self, slices: list[Slice]) -> None:
        super().__init__(slices)
        self.slices = slices


class FailedFile(InputPartition):
    """A file that could not be opened for planning, with the error."""

    def __init__(self, source: str, error: ScgptBatchError) -> None:
        super().__init__(source)
        self.source, self.error_class, self.error_message = source, type(error).__name__, str(error)


class AnnDataReader(DataSourceReader):
    """Plans tasks by ranges of cells; each task reads its own range.

    It has no `pushFilters`: with that method, Spark does not read at all unless a setting is on.
    """

    def __init__(self, options: Mapping[str, str]) -> None:
        given = {name.lower(): value for name, value in options.items()}
        path, paths = given.pop("path", None), given.pop("paths", None)
        self.patterns: list[str] = json.loads(paths) if paths else [path] if path else []
        if not self.patterns:
            raise ConfigError('no files to read: pass them to spark.read.format("anndata").load(PATH)')
        self.names: dict[str, str] = json.loads(given.pop("names", "{}"))
        on_error = given.pop("on_error", RAISE)
        if on_error not in (RAISE, RECORD):
            raise ConfigError(f"option on_error is {on_error!r}: use {RAISE!r} or {RECORD!r}")
        self.record = on_error == RECORD
        try:
            self.options = ReadOptions.model_validate(given)
        except ValidationError as exc:
            raise ConfigError(validation_message(exc, "option")) from exc

    def partitions(self) -> list[InputPartition]:
        """Divide the files into tasks."""
        sources = find_sources(self.patterns)
        names = self.names or name_sources(sources, self.options.id_from)
        return [part for source in sources for part in self._parts(source, names[source])]

    def _parts(self, source: str, name: str) -> list[InputPartition]:
        try:
            return [RowsPartition(slices) for slices in plan_file(source, name, self.options)]
        except (ConfigError, FileError) as exc:
            if not self.record:
                raise
            return [FailedFile(source, exc)]

    def read(self, partition: Any) -> Iterator[pa.RecordBatch]:
        """Read a task's rows, one at a time."""
        if partition is None:  # no files
            return
        if isinstance(partition, FailedFile):
            yield self._failed(partition)
            return
        try:
            for row in read(partition.slices, self.options):
                with named_errors(partition.slices[0].path):  # for strings that Arrow cannot represent
                    batch = self._batch(row)
                yield batch
        except (ConfigError, FileError) as exc:
            if not self.record:
                raise
            yield self._failed(FailedFile(partition.slices[0].path, exc))

    def _failed(self, file: FailedFile) -> pa.RecordBatch:
        return self._batch(
            {"source": file.source, "error_class": file.error_class, "error_message": file.error_message}
        )

    def _batch(self, row: Mapping[str, Any]) -> pa.RecordBatch:
        schema = pa.schema([*ROWS, *REPORT]) if self.record else ROWS
        return pa.RecordBatch.from_arrays([pa.array([row.get(f.name)], f.type) for f in schema], schema=schema)

"""`spark.read.format("anndata").load("/data/*.h5ad")`: files of counts as a Spark data source (Spark 4.0 or newer).

Options: `cells_per_row`, `split_by`, `gene_symbols`. Executors have to see the paths and to have this package.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
from pydantic import ValidationError
from pyspark.sql import SparkSession
from pyspark.sql.datasource import DataSource, DataSourceReader, InputPartition
from pyspark.sql.types import StructType

from scgpt_batch.errors import ConfigError
from scgpt_batch.parameters import validation_message
from scgpt_batch.spark.files import ReadOptions, Slice, plan, read

ROWS = pa.schema(
    [
        ("adata_id", pa.string()), ("x_data", pa.list_(pa.float32())), ("x_indices", pa.list_(pa.int32())),
        ("x_indptr", pa.list_(pa.int64())), ("n_obs", pa.int32()), ("n_vars", pa.int32()), ("adata_obs", pa.string()),
        ("adata_var", pa.string()), ("source", pa.string()), ("x_dtype", pa.string()),
    ]
)  # fmt: skip
ROWS_DDL = """
    adata_id STRING, x_data ARRAY<FLOAT>, x_indices ARRAY<INT>, x_indptr ARRAY<BIGINT>, n_obs INT, n_vars INT,
    adata_obs STRING, adata_var STRING, source STRING, x_dtype STRING
"""


def register(spark: SparkSession) -> None:
    """Make the format `anndata` known to a session."""
    spark.dataSource.register(AnnDataSource)


class AnnDataSource(DataSource):
    """The format `anndata`: one row of `adata_rows` for up to `cells_per_row` cells of a file."""

    @classmethod
    def name(cls) -> str:
        """Return the name of the format."""
        return "anndata"

    def schema(self) -> str:
        """Return the columns: those of `adata_rows` that a file can fill."""
        return ROWS_DDL

    def reader(self, schema: StructType) -> "AnnDataReader":
        """Return the reader of the files that `load` was given."""
        return AnnDataReader(self.options)


class RowsPartition(InputPartition):
    """The rows that one task reads."""

    def __init__(self, slices: list[Slice]) -> None:
        super().__init__(slices)
        self.slices = slices


class AnnDataReader(DataSourceReader):
    """Plans tasks by ranges of cells; each task reads its own.

    It does not take filters (`pushFilters`): Spark refuses to read where that method exists and a setting is off.
    """

    def __init__(self, options: Mapping[str, str]) -> None:
        given = {name.lower(): value for name, value in options.items()}
        path, paths = given.pop("path", None), given.pop("paths", None)
        self.patterns: list[str] = json.loads(paths) if paths else [path] if path else []
        if not self.patterns:
            raise ConfigError('say which files: spark.read.format("anndata").load(PATH)')
        try:
            self.options = ReadOptions.model_validate(given)
        except ValidationError as exc:
            raise ConfigError(validation_message(exc, "option")) from exc

    def partitions(self) -> list[InputPartition]:
        """Cut the files into tasks."""
        return [RowsPartition(slices) for slices in plan(self.patterns, self.options)]

    def read(self, partition: Any) -> Iterator[pa.RecordBatch]:
        """Read a task's rows, one at a time."""
        if partition is None:  # files without a cell
            return
        for row in read(partition.slices, self.options):
            yield pa.RecordBatch.from_arrays([pa.array([row[f.name]], f.type) for f in ROWS], schema=ROWS)

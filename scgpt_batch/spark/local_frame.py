"""DataFrames of lines that the driver holds."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import StructType


def local_frame(spark: SparkSession, lines: Sequence[Sequence[Any]], schema: StructType) -> DataFrame:
    """Return a DataFrame of lines, each with a value for each column; None is null.

    The lines travel as an Arrow table. From Python objects Spark would make a DataFrame whose every use starts Python
    workers, only to read the lines.
    """
    arrow = to_arrow_schema(schema)
    columns = zip(*lines, strict=True) if lines else [()] * len(arrow)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, arrow, strict=True)]
    return spark.createDataFrame(pa.Table.from_arrays(arrays, schema=arrow), schema)

"""The table that a vector search index follows: one line for each cell or gene, of one model version, of length 1.

The embedding tables keep the vectors of all versions and parameters. A search must see those of one only. An index
needs a single key, a change feed, and, for cosine, vectors of length 1: the nearest by euclidean distance are the same.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from scgpt_batch.errors import ConfigError
from scgpt_batch.spark import tables

logger = logging.getLogger(__name__)


_MARK = "scgpt_batch.search_table"  # a property of these tables, whose other lines are deleted


def create_search_table(spark: SparkSession, table: str, columns: str, vector_length: int) -> None:
    """Create a search table with these columns unless it exists.

    Raises
    ------
    ConfigError
        The table holds other lines, which would be lost.
    """
    exists = tables.exists(spark, table)
    is_marked = exists and _is_marked(spark, table)
    if exists and not is_marked and not spark.table(table).isEmpty():
        raise ConfigError(
            f"{table} is not a search table: embed would delete its lines. Name a new table with --search-table"
        )
    comment = "scGPT embeddings of one model version, of length 1, for vector search"
    tables.create(spark, table, columns, vector_length=vector_length, comment=comment, key="embedding_id")
    if not is_marked:
        spark.sql(f"ALTER TABLE {table} SET TBLPROPERTIES ('{_MARK}' = 'true')")


def _is_marked(spark: SparkSession, table: str) -> bool:
    return _MARK in {row["key"] for row in spark.sql(f"SHOW TBLPROPERTIES {table}").collect()}


def update_search_table(
    spark: SparkSession,
    table: str,
    wanted: DataFrame,
    vectors: Callable[[DataFrame], DataFrame],
    *,
    same: Sequence[str],
) -> int:
    """Make a search table equal to `wanted`; return how many lines were written or deleted.

    Lines that the table has already are neither computed nor written again, so its change feed has only what is new,
    changed or gone, and a run without changes commits nothing.

    Parameters
    ----------
    table
        The search table, which exists.
    wanted
        Its lines without the column `embedding`, each `embedding_id` once.
    vectors
        Function that adds the column `embedding` to some of these lines.
    same
        Columns by which a line is recognised as unchanged, `embedding_id` first.
    """
    have = spark.table(table).select(*same)
    changed = wanted.join(have, list(same), "left_anti")
    gone = have.join(wanted, "embedding_id", "left_anti").select("embedding_id")
    if changed.isEmpty() and gone.isEmpty():
        return 0
    lines = vectors(changed)
    written, deleted = tables.merge_lines(spark, table, lines.mapInArrow(_of_length_one, lines.schema), gone)
    logger.info("%s: %d vectors written, %d deleted", table, written, deleted)
    return written + deleted


def _of_length_one(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Divide each vector by its length; a vector of zeros has no direction and is left out."""
    for batch in batches:
        place = batch.schema.get_field_index("embedding")
        column = batch.column(place)
        vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        unit = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
        offsets = pa.array(np.arange(len(batch) + 1, dtype=np.int32) * vectors.shape[1])
        made = pa.ListArray.from_arrays(offsets, pa.array(unit.ravel()), type=column.type)
        yield batch.set_column(place, batch.schema.field(place), made).filter(pa.array(lengths.ravel() > 0))

"""DataFrames that are computed once and used several times, where the compute supports that."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pyspark import StorageLevel
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.utils import is_remote

from scgpt_batch.errors import ConfigError, in_one_line
from scgpt_batch.spark.errors import is_not_supported

logger = logging.getLogger(__name__)


@contextmanager
def persisted(frame: DataFrame, level: StorageLevel = StorageLevel.DISK_ONLY) -> Iterator[DataFrame]:
    """Keep a DataFrame on the executors; on serverless compute, which cannot, it is computed at each use."""
    try:
        frame.persist(level)
    except PySparkException as exc:
        if not is_not_supported(exc):
            raise
        logger.info("this compute cannot persist, so some steps are computed more than once: %s", in_one_line(exc))
        yield frame
        return
    try:
        yield frame
    finally:
        frame.unpersist()


def require_persist(spark: SparkSession) -> None:
    """Check that the compute can keep what its workers computed.

    Raises
    ------
    ConfigError
        It is serverless.
    """
    if not is_remote():
        return
    probe = spark.range(1)
    try:
        probe.persist(StorageLevel.DISK_ONLY)
    except PySparkException as exc:
        if not is_not_supported(exc):
            raise
        raise ConfigError(
            "embed needs a classic dedicated cluster: serverless compute cannot keep computed rows, which are used "
            f"three times, and gives Spark's Python functions no GPU ({in_one_line(exc)}). Run it on a job cluster "
            "with data_security_mode SINGLE_USER, as the bundle's nightly job does"
        ) from exc
    probe.unpersist()

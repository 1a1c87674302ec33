"""A local Spark session with Delta Lake, the same for both sides of a benchmark.

Runs in either environment; the worker's Python is the one that calls.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from pyspark.sql import SparkSession

DELTA_JAR = "io.delta:delta-spark_4.1_2.13:4.4.0"  # from Maven Central, through Ivy

CONF = {
    "spark.jars.packages": DELTA_JAR,
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.driver.memory": "4g",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.sql.session.timeZone": "UTC",
    # The defaults, 200 and 50, are for clusters: on two cores Delta's would cost 10 s a commit.
    "spark.sql.shuffle.partitions": "2",
    "spark.databricks.delta.snapshotPartitions": "2",
}


def delta_session(name: str, *, cores: int = 2, conf: Mapping[str, str] | None = None) -> SparkSession:
    """Start Spark on `cores` cores of this machine; `conf` goes on top of CONF."""
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    builder = SparkSession.builder.master(f"local[{cores}]").appName(name)
    for key, value in {**CONF, **(conf or {})}.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    return spark

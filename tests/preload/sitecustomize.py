"""Imports our modules into Spark's Python daemons, which fork the workers.

Otherwise each worker imports them, which takes seconds, and Spark ends workers that were idle for a minute.
"""

import sys

if "pyspark.daemon" in sys.orig_argv:
    if sys.orig_argv[-1].endswith(("create_data_source", "plan_data_source_read")):
        import scgpt_batch.spark.datasource
    elif sys.orig_argv[-1] == "pyspark.worker":
        import scanpy  # noqa: F401

        import scgpt_batch.spark.datasource
        import scgpt_batch.spark.worker  # noqa: F401

"""Imports our modules into Spark's Python daemons, which fork the workers.

Otherwise each worker imports them, which takes seconds, and Spark ends workers that were idle for a minute. The modules
are left out of the garbage collection that follows each task; and archives are taken off the path, because before each
task Python 3.11 reads the tables of contents of all that it has imported from: pyspark's alone takes 0.1 s.
"""

import gc
import sys

if "pyspark.daemon" in sys.orig_argv:
    sys.path[:] = [path for path in sys.path if not path.endswith((".jar", "pyspark.zip", "-src.zip"))]
    if sys.orig_argv[-1].endswith(("create_data_source", "plan_data_source_read")):
        import scgpt_batch.spark.datasource
    elif sys.orig_argv[-1] == "pyspark.worker":
        import scanpy  # noqa: F401

        import scgpt_batch.spark.datasource
        import scgpt_batch.spark.worker  # noqa: F401
    gc.freeze()

"""The driver of test_cluster: says what each executor was given, then runs the embed job.

The checkpoint's folder gets a name that only this driver knows, as a folder on a driver's own disk is.
"""

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
from pyspark import TaskContext
from pyspark.sql import SparkSession

from scgpt_batch.cli.main import job
from scgpt_batch.spark import wave
from scgpt_batch.spark import worker as udf


def surroundings(batches):
    """For `mapInArrow`: where the task runs and with what."""
    import scgpt_batch

    for _ in batches:
        gpu = TaskContext.get().resources()["gpu"].addresses
        facts = [str(Path.cwd()), scgpt_batch.__file__, str(udf.task_device()), *gpu]
        yield pa.RecordBatch.from_pydict({"facts": [json.dumps(facts)]})


def of_this_driver_only(**fields):
    return udf.ModelRef(**fields | {"checkpoint": "/on/the/driver/only"})


if __name__ == "__main__":
    spark = SparkSession.builder.getOrCreate()
    # a barrier: both tasks run at once, so each on an executor of its own
    tasks = spark.range(0, 2, 1, 2).mapInArrow(surroundings, "facts STRING", barrier=True).collect()
    Path(os.environ["SURROUNDINGS"]).write_text(json.dumps([json.loads(line["facts"]) for line in tasks]))
    wave.ModelRef = of_this_driver_only
    job(sys.argv.pop(1))

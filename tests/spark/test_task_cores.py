"""The cores of a task: Spark passes `spark.task.cpus` to its Python worker, which uses as many threads."""

import json
import subprocess
import sys

CODE = """
import json
import sys
from scgpt_batch.spark.session import get_spark

spark = get_spark({"spark.master": "local[3]", "spark.task.cpus": "3", "spark.ui.enabled": "false"})
folder = sys.argv[1]


def threads(_):
    import numba
    import os
    import torch
    from scgpt_batch.models.scgpt import checkpoint_digest
    from scgpt_batch.spark.worker import ModelRef

    ModelRef(folder, checkpoint_digest(folder), "", "", "").load()
    environment, most = os.environ["OMP_NUM_THREADS"], numba.config.NUMBA_NUM_THREADS
    yield environment, torch.get_num_threads(), numba.get_num_threads(), most


print(json.dumps(spark.sparkContext.parallelize([0], 1).mapPartitions(threads).collect()[0]))
"""


def test_task_with_all_cores_uses_as_many_threads(golden):
    command = [sys.executable, "-c", CODE, str(golden / "checkpoint_flash")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    environment, torch_threads, numba_threads, numba_most = json.loads(done.stdout.splitlines()[-1])
    assert (environment, torch_threads, numba_threads) == ("3", 3, min(3, numba_most))

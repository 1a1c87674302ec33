"""What a Python worker sets up when it loads the model: the threads of its task, and short pauses between tasks."""

import json
import subprocess
import sys

import pytest

CODE = """
import json
import sys
from scgpt_batch.spark.session import get_spark

spark = get_spark({"spark.master": "local[3]", "spark.task.cpus": "3", "spark.ui.enabled": "false"})
folder = sys.argv[1]


def threads(numbers):
    import numba
    import os
    import torch
    from scgpt_batch.models.scgpt.checkpoint import checkpoint_digest
    from scgpt_batch.spark.worker import ModelRef

    ModelRef(folder, checkpoint_digest(folder), "", "", "").load()
    environment, most = os.environ["OMP_NUM_THREADS"], numba.config.NUMBA_NUM_THREADS
    list(numbers)  # a worker with input left is not used again
    yield environment, torch.get_num_threads(), numba.get_num_threads(), most


def between_tasks(numbers):
    import gc
    import os
    import sys
    from zipimport import zipimporter

    archives = [path for path, finder in sys.path_importer_cache.items() if isinstance(finder, zipimporter)]
    list(numbers)
    yield os.getpid(), archives, gc.get_freeze_count() > len(gc.get_objects())


one = spark.sparkContext.parallelize([0], 1)
before, used, after = (one.mapPartitions(each).collect()[0] for each in (between_tasks, threads, between_tasks))
print(json.dumps([used, before, after]))
"""


@pytest.fixture(scope="module")
def told(golden):
    command = [sys.executable, "-c", CODE, str(golden / "checkpoint_flash")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_task_with_all_cores_uses_as_many_threads(told):
    environment, torch_threads, numba_threads, numba_most = told[0]
    assert (environment, torch_threads, numba_threads) == ("3", 3, min(3, numba_most))


def test_worker_reads_no_archives_and_checks_no_libraries_for_garbage_between_tasks(told):
    (worker, archives, frozen), (same_worker, archives_left, frozen_now) = told[1:]
    assert worker == same_worker and archives and not frozen
    assert (archives_left, frozen_now) == ([], True)

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
def tasks(golden):
    """What a task with the model saw of its threads, and what a task before it and one after it saw."""
    command = [sys.executable, "-c", CODE, str(golden / "checkpoint_flash")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_task_with_all_cores_uses_all_of_them(tasks):
    environment, torch_threads, numba_threads, numba_most = tasks[0]
    assert (environment, torch_threads, numba_threads) == ("3", 3, min(3, numba_most))


def test_the_pause_between_tasks_is_short_once_the_model_is_loaded(tasks):
    """Spark's worker then reads archives again and collects garbage: no archive is left, and libraries are frozen."""
    (process, archives, frozen), (same_process, archives_after, frozen_after) = tasks[1:]
    assert process == same_process and archives and not frozen
    assert (archives_after, frozen_after) == ([], True)

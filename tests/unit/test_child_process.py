"""Processes for single items end with the process that started them."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.endpoint_process import wait_until
from tests.paths import REPO

PARENT = """
import sys
from scgpt_batch.child_process import ChildProcess
from tests.unit.test_child_process import hanging
ChildProcess(hanging).run(sys.argv[1], 600)
"""

QUICK = """
import tempfile
from scgpt_batch.child_process import ChildProcess
from tests.unit.test_child_process import doubling
print(ChildProcess(doubling).run(21, 60), tempfile.gettempdir())
"""


def doubling():
    return lambda number: 2 * number


def hanging():
    """A function that tells its process and then never ends, in native code that keeps Python's lock."""

    def hang(path):
        Path(path).write_text(str(os.getpid()))
        ctypes.PyDLL(None).pause()

    return hang


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="only Linux ends an orphan (SIGIO on a pipe)",
)
def test_a_hanging_process_ends_when_its_parent_is_killed(tmp_path):
    pid_file = tmp_path / "pid"
    environment = os.environ | {"PYTHONPATH": str(REPO), "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(pid_file)], env=environment)
    try:
        wait_until(lambda: pid_file.exists() and pid_file.read_text())
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not is_running(int(pid_file.read_text())))


def test_a_child_starts_below_a_long_temporary_folder(tmp_path):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(REPO), "TMPDIR": str(folder)}
    finished = subprocess.run(
        [sys.executable, "-c", QUICK], env=environment, capture_output=True, text=True, timeout=120
    )
    assert finished.stdout.strip() == f"42 {folder}", finished.stderr

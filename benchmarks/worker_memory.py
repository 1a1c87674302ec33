"""Watch the peak memory of a driver, its JVM and Spark's Python workers from outside, through /proc (Linux).

A worker is a descendant of the watched process whose command line names `pyspark.daemon`. The kernel keeps
each process's own high-water mark (`VmHWM`), so a peak between two looks is seen as long as the worker
lives until the second; one that dies sooner is seen as it was last.
"""

from __future__ import annotations

import threading
from pathlib import Path

PROC = Path("/proc")


def _parents() -> dict[int, int]:
    """The parent of every process; processes that end while we look are left out."""
    parents = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                # The name in parentheses may hold spaces: count the fields after it.
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    return parents


def descendants(pid: int) -> set[int]:
    """All processes below `pid`, at any depth."""
    parents = _parents()
    found: set[int] = set()
    generation = {pid}
    while generation:
        generation = {child for child, parent in parents.items() if parent in generation} - found
        found |= generation
    return found


def _peak_mb(pid: int, word: bytes) -> float:
    """The high-water mark of a process in MB; 0 when `word` is not in its command line."""
    try:
        if word not in (PROC / str(pid) / "cmdline").read_bytes():
            return 0.0
        status = (PROC / str(pid) / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    kilobytes = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(kilobytes[0]) * 1024 / 1e6 if kilobytes else 0.0


class WorkerMemory(threading.Thread):
    """Look at the workers below `pid` every `interval` seconds; use as a context manager.

    `peak_mb` is the largest high-water mark of a single worker, in MB of 10^6 bytes; 0 when none was seen.
    `driver_peak_mb` is that of the watched process, `jvm_peak_mb` of its JVM.
    """

    def __init__(self, pid: int, *, interval: float = 0.2) -> None:
        super().__init__(daemon=True)
        self.pid, self.interval = pid, interval
        self.peak_mb = self.driver_peak_mb = self.jvm_peak_mb = 0.0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(self.interval):
            below = descendants(self.pid)
            self.peak_mb = max([self.peak_mb, *(_peak_mb(pid, b"pyspark.daemon") for pid in below)])
            self.jvm_peak_mb = max([self.jvm_peak_mb, *(_peak_mb(pid, b"java") for pid in below)])
            self.driver_peak_mb = max(self.driver_peak_mb, _peak_mb(self.pid, b""))

    def __enter__(self) -> WorkerMemory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

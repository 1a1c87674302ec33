"""The fault scenarios: each gets a bench and a number of tries, and returns its result."""

import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from deltalake import DeltaTable, write_deltalake

from tests.cluster import Standalone, standalone
from tests.faults.bench import (
    REPO,
    WAVE,
    Bench,
    Driver,
    Ended,
    Result,
    arrow,
    beside,
    if_alive,
    kill,
    read_columns,
    small_row,
    small_rows,
)  # fmt: skip
from tests.faults.fuzz import fuzzed_payloads

POISON = Path(__file__).parent / "poison"
RUNNING = " INFO run "  # the first line that the job logs: Spark runs, the tables exist
TICK = 0.02  # seconds between two checks of a process or folder
WAVES = 3  # per run


def until(seen: Callable[[], Any], running: Callable[[], bool]) -> Any:
    """Return the first truthy value of `seen` while a command runs, or its value after the command has ended."""
    while not (found := seen()) and running():
        time.sleep(TICK)
    return found or seen()


def whole_run(bench: Bench, driver: Driver, table: Path) -> float:
    """Return the seconds that an undisturbed run takes, after a first run to warm up."""
    for i in range(2):
        ended = driver.run(bench.embed(table, beside(table, f"-whole-{time.monotonic_ns()}")))
        if ended.code:
            raise RuntimeError(f"undisturbed run {i}: {ended.said[-2000:]}")
    return ended.summary["seconds"]


def random_moment(out: Path, running: Callable[[], bool], whole: float) -> None:
    """Wait until a random moment of a random wave, in a run that takes `whole` seconds."""
    done = random.randrange(WAVES)
    log = beside(out, "_ledger") / "_delta_log"  # its first commit creates the table, each further one is a wave
    until((log / f"{done:020}.json").exists, running)
    time.sleep(random.uniform(0, whole / WAVES))


# --- killed processes -----------------------------------------------------------------------------


def driver_killed(bench: Bench, tries: int) -> Result:
    """kill -9 of driver, JVM and workers at a random moment, then a rerun."""
    rows = small_rows(WAVES * WAVE)
    table = bench.rows("driver", rows)

    def start(out: Path) -> subprocess.Popen:
        log = beside(out, ".stderr")
        process = bench.command(bench.embed(table, out), log)
        until(lambda: RUNNING in log.read_text(), lambda: process.poll() is None)
        return process

    process, started = start(bench.folder / "whole"), time.monotonic()
    if process.wait():
        raise RuntimeError((bench.folder / "whole.stderr").read_text()[-2000:])
    whole = time.monotonic() - started

    def killed(out: Path, seen: Counter[str]) -> Iterator[str]:
        process = start(out)
        random_moment(out, lambda: process.poll() is None, whole)
        seen["killed while running" if process.poll() is None else "had ended"] += 1
        kill(process)
        written = set(read_columns(out, "adata_id")["adata_id"])
        recorded = set(read_columns(beside(out, "_ledger"), "adata_id")["adata_id"])
        seen[f"{len(recorded) // WAVE} waves done" + " and one half" * (written != recorded)] += 1
        if len(written - recorded) > WAVE:
            yield f"{len(written - recorded)} rows have embeddings but no ledger line; a wave has {WAVE}"
        ended = bench.warm.run(bench.embed(table, out))
        yield from ended.unless(0)
        if ended.summary.get("rows_ok") != len(rows) - len(recorded):
            yield f"the rerun embedded {ended.summary.get('rows_ok')} rows, {len(rows) - len(recorded)} were pending"

    return bench.tries("driver-killed", tries, rows, killed)


def worker_killed(bench: Bench, tries: int) -> Result:
    """kill -9 of a busy Python worker (each row takes half a second): the run continues."""
    driver = bench.driver(path=POISON)

    def attack() -> bool:
        computing = busy(python_workers(driver.process))
        if computing:
            if_alive(random.choice(computing).kill)
        return bool(computing)

    rows = [small_row(f"slow:{i}") for i in range(WAVES * WAVE)]
    return part_killed(bench, tries, "worker-killed", driver, rows, attack)


def executor_killed(bench: Bench, tries: int) -> Result:
    """kill -9 of an executor of a standalone cluster of two: the run continues."""

    def attack(two: Standalone) -> bool:
        found = executors(two)
        if found:
            if_alive(random.choice(found).kill)
        return bool(found)

    return on_cluster(bench, tries, "executor-killed", attack)


def host_lost(bench: Bench, tries: int) -> Result:
    """kill -9 of a worker of a standalone cluster of two, with its executor: the run continues on the other."""

    def attack(two: Standalone) -> bool:
        kill(two.workers.pop(random.randrange(2)))
        return True

    return on_cluster(bench, tries, "host-lost", attack)


def on_cluster(bench: Bench, tries: int, name: str, attack: Callable[[Standalone], bool]) -> Result:
    folder = bench.folder / f"{name}-cluster"
    folder.mkdir()
    with standalone(folder) as two:
        conf = (f"spark.master={two.url}", "spark.executor.memory=600m", f"spark.executorEnv.PYTHONPATH={REPO}")
        driver, rows = bench.driver(*conf), small_rows(WAVES * WAVE)
        return part_killed(bench, tries, name, driver, rows, lambda: attack(two), lambda: complete(two))


def part_killed(
    bench: Bench,
    tries: int,
    name: str,
    driver: Driver,
    rows: list[dict[str, Any]],
    attack: Callable[[], bool],
    mend: Callable[[], None] = lambda: None,
) -> Result:
    """Attack a part of the driver's run at a random moment; `attack` returns whether it found something to kill.

    `mend` puts the part back before each try.
    """
    table = bench.rows(name, rows)
    whole = whole_run(bench, driver, table)

    def killed(out: Path, seen: Counter[str]) -> Iterator[str]:
        mend()
        driver.start(bench.embed(table, out))
        random_moment(out, driver.running, whole)
        hit = driver.running() and until(attack, driver.running)
        ended = driver.end()
        seen["killed while running" if hit else "nothing to kill"] += 1
        seen["waves repeated"] += ended.said.count("a Python worker was lost")
        yield from ended.unless(0)

    return bench.tries(name, tries, rows, killed)


def python_workers(process: subprocess.Popen) -> list[psutil.Process]:
    """Return a driver's Python workers: the processes that Spark's daemon has forked."""
    family = psutil.Process(process.pid).children(recursive=True)
    daemons = {p.pid for p in family if "pyspark.daemon" in (if_alive(p.cmdline) or [])}
    return [p for p in family if p.pid in daemons and if_alive(p.ppid) in daemons]


def busy(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that use a CPU at this moment."""
    before = {p: if_alive(p.cpu_times) for p in processes}
    time.sleep(0.1)
    return [p for p, then in before.items() if then and (now := if_alive(p.cpu_times)) and now.user > then.user]


def executors(cluster: Standalone) -> list[psutil.Process]:
    """Return the executors that a cluster's workers have started."""
    started = [p for worker in cluster.workers for p in psutil.Process(worker.pid).children()]
    return [p for p in started if any("CoarseGrainedExecutorBackend" in word for word in if_alive(p.cmdline) or [])]


def complete(cluster: Standalone) -> None:
    """Start a replacement for the killed worker."""
    while len(cluster.workers) < 2:
        cluster.add_worker()
    deadline = time.monotonic() + 60
    until(lambda: len(executors(cluster)) == 2, lambda: time.monotonic() < deadline)


# --- drivers, rows and disks ----------------------------------------------------------------------


def two_drivers(bench: Bench, tries: int) -> Result:
    """Two concurrent runs over the same tables produce the same tables as one."""
    rows = small_rows(WAVES * WAVE)
    table = bench.rows("two", rows)
    drivers = (bench.warm, bench.driver())
    whole = min([whole_run(bench, driver, table) for driver in drivers])

    def both(out: Path, seen: Counter[str]) -> Iterator[str]:
        first, second = random.sample(drivers, 2)
        first.start(bench.embed(table, out))
        time.sleep(random.uniform(0, 0.7 * whole))
        second.start(bench.embed(table, out))
        for driver in (first, second):
            ended = driver.end()
            seen["conflicts with another writer"] += ended.said.count("conflict with another writer")
            seen["rows left to the other"] += ended.summary.get("rows_skipped", 0)
            yield from ended.unless(0)

    return bench.tries("two-drivers", tries, rows, both)


def poison(bench: Bench, tries: int, rows_in: int = 1000) -> Result:
    """Among many rows, some raise, segfault, hang or exhaust memory: only these rows fail."""
    rows = small_rows(rows_in)
    for number, how in enumerate(["raise", "segfault", "hang", "memory"] * tries):
        rows[number * rows_in // (4 * tries)] = small_row(f"{how}:{number}")
    table = bench.rows("poison", rows)
    driver = bench.driver("spark.executor.pyspark.memory=6g", path=POISON)

    def among_others(out: Path, seen: Counter[str]) -> Iterator[str]:
        ended = driver.run(bench.embed(table, out, wave_cells=600, row_timeout=10))
        yield from ended.unless(0, raises=True)
        ledger = read_columns(beside(out, "_ledger"), "adata_id", "status", "error_class")
        failed = ledger[ledger["status"] == "failed"]
        seen.update(failed["error_class"])
        found = dict(zip(failed["adata_id"], failed["error_class"], strict=True))
        deadly = [row["adata_id"] for row in rows if ":" in row["adata_id"]]
        wanted = {key: "Timeout" if key.startswith("hang") else "WorkerCrash" for key in deadly}
        if found != wanted:
            yield f"failed rows are {found}"

    return bench.tries("poison-rows", 1, rows, among_others)


def disk_full(bench: Bench, tries: int) -> Result:
    """The output's file system is full while a wave is committed; afterwards it has space again."""
    rows = small_rows(WAVES * WAVE)
    table = bench.rows("full", rows)
    bench.disk(roomy := bench.folder / "roomy")
    ended = bench.warm.run(bench.embed(table, roomy / "out"))
    if ended.code:
        raise RuntimeError(ended.said[-2000:])
    needed = psutil.disk_usage(str(roomy)).used

    def full(out: Path, seen: Counter[str]) -> Iterator[str]:
        bench.disk(out.parent, size=int(random.uniform(0.1, 0.9) * needed))
        yield from refused(bench.warm.run(bench.embed(table, out)), seen)
        remount(out.parent, "size=64m")
        yield from bench.warm.run(bench.embed(table, out)).unless(0)

    return bench.tries("disk-full", tries, rows, full)


def read_only(bench: Bench, tries: int) -> Result:
    """The output's file system becomes read-only between two commits; afterwards it is writable again.

    (Root, as who this runs, writes where folders are read-only; a file system stops it.)
    """
    rows = small_rows(WAVES * WAVE)
    table = bench.rows("readonly", rows)

    def protected(out: Path, seen: Counter[str]) -> Iterator[str]:
        bench.disk(out.parent)
        bench.warm.start(bench.embed(table, out))
        commit = random.choice([out, beside(out, "_ledger")]) / "_delta_log" / f"{random.randrange(3):020}.json"
        until(commit.exists, bench.warm.running)
        until(lambda: remount(out.parent, "ro"), bench.warm.running)  # fails while a file is being written
        yield from refused(bench.warm.end(), seen)
        remount(out.parent, "rw")
        yield from bench.warm.run(bench.embed(table, out)).unless(0)

    return bench.tries("read-only", tries, rows, protected)


def refused(ended: Ended, seen: Counter[str]) -> Iterator[str]:
    """A run that cannot write must end with exit code 1 and name the cause."""
    yield from ended.unless(1)
    if not any(why in ended.last for why in ("No space left", "Read-only file system")):
        yield f"the last line does not name the cause: {ended.last}"


def remount(place: Path, options: str) -> bool:
    return (
        subprocess.run(["mount", "-o", f"remount,{options}", place], capture_output=True, check=False).returncode == 0
    )


def input_changes(bench: Bench, tries: int) -> Result:
    """The input table is changed (appended, rewritten, compacted, vacuumed) during a run, which reads one snapshot."""
    rows = small_rows(WAVES * WAVE)
    whole = whole_run(bench, bench.warm, bench.rows("unchanged", rows))

    def changed(out: Path, seen: Counter[str]) -> Iterator[str]:
        table = bench.rows(f"{out.parent.name}/rows", rows)
        bench.warm.start(bench.embed(table, out))
        until(lambda: RUNNING in bench.warm.said(), bench.warm.running)
        random_moment(out, bench.warm.running, whole)
        way = random.choice([append, rewrite, compact])
        way(table)
        DeltaTable(table).vacuum(dry_run=False)
        seen[f"{way.__name__} {'while running' if bench.warm.running() else 'too late'}"] += 1
        yield from bench.warm.end().unless(0)

    return bench.tries("input-changes", tries, rows, changed)


def append(table: Path) -> None:
    write_deltalake(table, arrow([small_row(f"later-{i}") for i in range(WAVE)]), mode="append")


def rewrite(table: Path) -> None:
    """Overwrite the table with other contents for half of the keys, without the other half."""
    write_deltalake(
        table, arrow([small_row(f"row-{i:04}", salt="new") for i in range(WAVES * WAVE // 2)]), mode="overwrite"
    )


def compact(table: Path) -> None:
    DeltaTable(table).optimize.compact()


# name -> scenario and default number of tries
SCENARIOS: dict[str, tuple[Callable[[Bench, int], Result], int]] = {
    "driver-killed": (driver_killed, 30),
    "worker-killed": (worker_killed, 20),
    "executor-killed": (executor_killed, 20),
    "host-lost": (host_lost, 10),
    "two-drivers": (two_drivers, 10),
    "poison-rows": (poison, 1),
    "disk-full": (disk_full, 5),
    "read-only": (read_only, 5),
    "input-changes": (input_changes, 10),
    "fuzzed-payloads": (fuzzed_payloads, 10_000),
}

"""Check the environment: one line each, ok, or what is wrong and what mends it."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from scgpt_batch.command_result import WRONG_USAGE, CommandResult
from scgpt_batch.errors import ConfigError, in_one_line, install
from scgpt_batch.io.delta import open_table, table_path
from scgpt_batch.java import HINT, OLDEST, find_java
from scgpt_batch.settings import DoctorSettings
from scgpt_batch.spark_version import REMEDY, require_supported_spark

PYTHONS = ((3, 11), (3, 13))  # oldest and newest that are tested
FREE_DISK_GB, FREE_MEMORY_GB = 2, 4  # that a local run needs


@dataclass(frozen=True)
class Check:
    """One line.

    Attributes
    ----------
    name, ok
        What was checked, and whether it is well.
    detail
        What was found.
    remedy
        What mends it; "" if it is well.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class DoctorResult(CommandResult):
    """All checks; `status` is "ok", or "failed" if one failed."""

    status: str
    checks: list[Check]

    def to_dict(self) -> dict[str, Any]:
        """Return the values of the JSON line."""
        return {"status": self.status, "checks": [asdict(check) for check in self.checks]}

    def lines(self) -> list[str]:
        """Return one line per check, with the remedy below those that failed."""
        width = max(len(check.name) for check in self.checks)
        found = []
        for check in self.checks:
            found.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<{width}}  {check.detail}")
            if check.remedy:
                found.append(f"      {'':<{width}}  -> {check.remedy}")
        return found


def doctor(settings: DoctorSettings) -> DoctorResult:
    """Run all checks; exit code 2 if one fails."""
    # torch and MLflow take seconds to import, at the same time in two processes; a broken torch may crash its own
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other_process:
        torch_checks = other_process.submit(_torch_checks)
        checks = [_guarded(name, check) for name, check in _checks(settings)]
        at = next(i for i, check in enumerate(checks) if check.name == "MLflow tracking")
        checks[at:at] = _result(torch_checks)
    failed = not all(check.ok for check in checks)
    return DoctorResult(exit_code=WRONG_USAGE if failed else 0, status="failed" if failed else "ok", checks=checks)


def _checks(settings: DoctorSettings) -> Iterator[tuple[str, Callable[[], Check]]]:
    yield "Python", _python
    yield "Java", _java
    yield "Spark", _spark
    yield "Delta", _delta
    yield "MLflow tracking", lambda: _mlflow("MLflow tracking")
    yield "MLflow registry", lambda: _mlflow("MLflow registry")
    if settings.model_uri:
        yield "model", lambda: _model(settings.model_uri)
    for table in settings.tables:
        yield "table", lambda table=table: _table(table)  # type: ignore[misc]
    yield "disk", _disk
    yield "memory", _memory


def _torch_checks() -> list[Check]:
    """Run the checks that import torch."""
    return [_guarded(name, check) for name, check in (("torch", _torch), ("GPU", _gpu), ("attention", _attention))]


def _result(checks: Future[list[Check]]) -> list[Check]:
    try:
        return checks.result()
    except BrokenProcessPool:
        remedy = "install torch again, for this machine, from https://pytorch.org/get-started"
        return [Check("torch", False, "the process that imports it crashed", remedy)]


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """Run a check; an error in it is a failed check, so that the others still run."""
    try:
        return check()
    except Exception as exc:
        return Check(name, False, in_one_line(exc), "mend what the message names, then run doctor again")


def _python() -> Check:
    found = platform.python_version()
    oldest, newest = (".".join(map(str, limit)) for limit in PYTHONS)
    if sys.version_info[:2] < PYTHONS[0]:
        return Check("Python", False, found, f"install Python {oldest} to {newest}")
    note = "" if sys.version_info[:2] <= PYTHONS[1] else f" (newer than {newest}, the newest that is tested)"
    return Check("Python", True, f"{found} at {sys.executable}{note}")


def _java() -> Check:
    java, home = find_java(), os.environ.get("JAVA_HOME")
    if java is None:
        return Check("Java", False, f"no java at JAVA_HOME {home}" if home else "no java on the PATH", HINT)
    if java.major is None or java.major < OLDEST:
        first = java.output.splitlines()[0] if java.output else "gives no version"
        return Check("Java", False, f"{java.path}: {first}", HINT)
    return Check("Java", True, f"{java.major} at {java.path}")


def _spark() -> Check:
    try:
        found = version("pyspark")
    except PackageNotFoundError:
        return Check("Spark", False, "pyspark is not installed", install("local"))
    try:
        require_supported_spark()
    except ConfigError:
        return Check("Spark", False, f"pyspark {found}", REMEDY)
    return Check("Spark", True, f"pyspark {found}")


def _delta() -> Check:
    """Look for the package that matches Delta's jars, and for the jars; Databricks brings its own."""
    if "DATABRICKS_RUNTIME_VERSION" in os.environ:
        return Check("Delta", True, f"Databricks runtime {os.environ['DATABRICKS_RUNTIME_VERSION']}")
    try:
        found = version("delta-spark")
    except PackageNotFoundError:
        return Check("Delta", False, "delta-spark is not installed", install("local"))
    from scgpt_batch.spark.jars import cached_jars

    reader = "deltalake reads tables without Spark" if importlib.util.find_spec("deltalake") else "no deltalake"
    jars = f"jars in {cached[0].parent}" if (cached := cached_jars()) else "the first session fetches its jars"
    return Check("Delta", True, f"delta-spark {found}; {jars}; {reader}")


def _torch() -> Check:
    import torch

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    return Check("torch", True, f"{torch.__version__}, {built}, {torch.get_num_threads()} threads")


def _gpu() -> Check:
    import torch

    driver = _nvidia_driver()
    if torch.cuda.is_available():
        cards = [_card(i) for i in range(torch.cuda.device_count())]
        return Check("GPU", True, f"{', '.join(cards)}; driver {driver or 'unknown'}")
    if driver is None:
        return Check("GPU", True, "none; the model runs on the CPU")
    remedy = "install a torch build for CUDA, from https://pytorch.org/get-started, or a newer NVIDIA driver"
    found = f"driver {driver} is installed, but torch {torch.__version__} cannot use the GPU"
    return Check("GPU", False, found, remedy)


def _card(index: int) -> str:
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})"


def _nvidia_driver() -> str | None:
    """Return the version of the NVIDIA driver; None without a card."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.split() else None


def _attention() -> Check:
    import torch

    from scgpt_batch.models.attention import choose_backend

    if not torch.cuda.is_available():
        return Check("attention", True, f"{choose_backend(torch.device('cpu'), torch.float32)} on the CPU")
    half = torch.cuda.get_device_capability() >= (8, 0)
    backend = choose_backend(torch.device("cuda"), torch.bfloat16 if half else torch.float32)
    flash = importlib.util.find_spec("flash_attn") is not None
    return Check("attention", True, f"{backend}; flash-attn is {'' if flash else 'not '}installed")


def _mlflow(name: str) -> Check:
    import mlflow

    tracking = name == "MLflow tracking"
    uri = mlflow.get_tracking_uri() if tracking else mlflow.get_registry_uri()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return Check(name, True, f"{uri} (the first use creates it)")
    client = mlflow.MlflowClient()
    if tracking:
        client.search_experiments(max_results=1)
    else:
        client.search_registered_models(max_results=1)
    return Check(name, True, uri)


def _model(uri: str) -> Check:
    from scgpt_batch.registry.resolve import resolve

    found = resolve(uri)
    return Check("model", True, f"{found.uri}, digest {found.digest[:12]}, {len(found.vocabulary):,} tokens")


def _table(table: str) -> Check:
    """Open a table: one at a path without Spark, a named one through the session that there is."""
    path = table_path(table)
    if path is None:
        from scgpt_batch.spark import tables
        from scgpt_batch.spark.session import get_spark

        if not tables.exists(get_spark(), tables.table_name(table)):
            raise ConfigError(f"no table {table}")
        return Check("table", True, table)
    try:
        found = open_table(path)
    except ConfigError as exc:
        return Check("table", False, str(exc), "check the path; ingest or embed creates the table")
    return Check("table", True, f"{path}, version {found.version()}, {len(found.file_uris())} files")


def _disk() -> Check:
    folder = os.environ.get("SPARK_LOCAL_DIRS", "").split(",")[0] or tempfile.gettempdir()
    free = shutil.disk_usage(folder).free / 1e9
    if free < FREE_DISK_GB:
        remedy = f"free at least {FREE_DISK_GB} GB, or set SPARK_LOCAL_DIRS to a folder on a larger disk"
        return Check("disk", False, f"{free:.1f} GB free in {folder}", remedy)
    return Check("disk", True, f"{free:.0f} GB free in {folder}")


def _memory() -> Check:
    """Read the memory that is available, on Linux; elsewhere nothing is known."""
    info = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s+(\d+) kB", info.read_text()) if info.exists() else None
    if match is None:
        return Check("memory", True, "unknown on this system")
    free = int(match[1]) / 1e6
    if free < FREE_MEMORY_GB:
        remedy = f"a local run needs {FREE_MEMORY_GB} GB: end other programs, or set a lower spark.driver.memory"
        return Check("memory", False, f"{free:.1f} GB available", remedy)
    return Check("memory", True, f"{free:.0f} GB available")

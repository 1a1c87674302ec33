"""Real servers on this machine for tests: a standalone Spark cluster, Spark Connect, MLflow."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyspark

from tests.paths import REPO

SPARK_HOME = Path(pyspark.__file__).parent
CONF = REPO / "conf/spark-local.conf"
# JVMs that live for a minute or two: the second compiler would not pay (measured: a start of 19 s instead of 26).
QUICK_JVM = {"JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1"}


def environment(**more: str) -> dict[str, str]:
    """What a process gets: nothing of the test's own environment but the way to Java and to this Python."""
    kept = {name: os.environ[name] for name in ("HOME", "JAVA_HOME", "LANG", "TMPDIR") if name in os.environ}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | QUICK_JVM | {"PATH": path, "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"} | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(command: list, log: Path, ready: Callable[[], bool], **options) -> Iterator[subprocess.Popen]:
    """Run a process, and what it starts itself, until the block ends; the block starts when it is ready."""
    words = list(map(str, command))
    with log.open("w") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True, **options)
    try:
        until = time.monotonic() + 120
        while not ready():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{words[0]} did not start: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    for way in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, way)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Standalone:
    """A master, and workers of one core and one GPU address each, in folders of their own without the package."""

    def __init__(self, folder: Path, url: str, env: dict[str, str], stack: ExitStack) -> None:
        self.url, self.workers = url, list[subprocess.Popen]()
        self._folder, self._env, self._stack, self._started = folder, env, stack, 0

    def add_worker(self) -> None:
        """Start one more; it ends with the cluster."""
        folder, address = self._folder / f"worker{self._started}", self._started % 2
        folder.mkdir()
        discovery = folder / "gpus.sh"
        discovery.write_text(f'#!/bin/sh\necho \'{{"name": "gpu", "addresses": ["{address}"]}}\'\n')
        discovery.chmod(0o755)
        resources = f"-Dspark.worker.resource.gpu.amount=1 -Dspark.worker.resource.gpu.discoveryScript={discovery}"
        command = [SPARK_HOME / "bin/spark-class", "org.apache.spark.deploy.worker.Worker", "--host", "127.0.0.1",
                   "--cores", 1, "--memory", "1g", "--webui-port", 0, "--work-dir", folder, self.url]  # fmt: skip
        log, env = folder / "log", self._env | {"SPARK_WORKER_OPTS": resources}
        worker = server(command, log, lambda: "Successfully registered" in log.read_text(), env=env, cwd=folder)
        self.workers.append(self._stack.enter_context(worker))
        self._started += 1


@contextmanager
def standalone(folder: Path, workers: int = 2) -> Iterator[Standalone]:
    """Start a standalone cluster; it ends with the block."""
    port, spark_class = free_port(), SPARK_HOME / "bin/spark-class"
    env = environment(SPARK_DAEMON_MEMORY="256m", SPARK_HOME=str(SPARK_HOME))
    log = folder / "master.log"
    master = [spark_class, "org.apache.spark.deploy.master.Master", "--host", "127.0.0.1", "--port", port,
              "--webui-port", 0]  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(server(master, log, lambda: listens(port), env=env))
        cluster = Standalone(folder, f"spark://127.0.0.1:{port}", env, stack)
        for _ in range(workers):
            cluster.add_worker()
        yield cluster


@contextmanager
def connect_server(folder: Path) -> Iterator[str]:
    """A Spark Connect server on two local cores; give its address."""
    port = free_port()
    command = [SPARK_HOME / "bin/spark-submit", "--properties-file", CONF, "--master", "local[2]",
               "--conf", "spark.driver.memory=1g", "--conf", f"spark.sql.warehouse.dir={folder}/warehouse",
               "--conf", "spark.connect.grpc.binding.address=127.0.0.1",
               "--conf", f"spark.connect.grpc.binding.port={port}",
               "--class", "org.apache.spark.sql.connect.service.SparkConnectServer", "spark-internal"]  # fmt: skip
    env = environment(PYTHONPATH=str(REPO))
    with server(command, folder / "connect.log", lambda: listens(port), env=env, cwd=folder):
        yield f"sc://127.0.0.1:{port}"


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """A tracking server that keeps models for its clients; give its address."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", 1,
               "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--serve-artifacts",
               "--artifacts-destination", folder / "models"]  # fmt: skip

    def ready() -> bool:
        return listens(port) and urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200

    env = environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")  # it would start processes of its own
    with server(command, folder / "mlflow.log", ready, env=env, cwd=folder):
        yield f"http://127.0.0.1:{port}"


def package_zip(folder: Path) -> Path:
    """The package as `spark-submit --py-files` takes it."""
    path = folder / "scgpt_batch.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((REPO / "scgpt_batch").rglob("*")):
            if file.suffix != ".pyc" and file.is_file():
                archive.write(file, file.relative_to(REPO))
    return path

"""The Spark session of a command: the existing one, or a local one with Delta."""

import io
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from threading import Lock, Thread
from typing import Any

from py4j.protocol import Py4JError
from pyspark import SparkConf, SparkContext
from pyspark.errors import PySparkRuntimeError
from pyspark.java_gateway import launch_gateway
from pyspark.sql import SparkSession

from scgpt_batch.errors import ConfigError, in_one_line
from scgpt_batch.java import require_java
from scgpt_batch.spark.jars import local_conf

logger = logging.getLogger(__name__)


def get_spark(conf: Mapping[str, str] | None = None) -> SparkSession:
    """Return the session that spark-submit, Databricks or Spark Connect provides, else create one.

    It is a session in a Databricks workspace if databricks-connect is installed, else a local one.

    If this module's logger has level DEBUG, all that Spark prints is shown.

    Parameters
    ----------
    conf
        Spark settings that add to and override those of `spark-local.conf`. An existing session keeps its own settings.

    Raises
    ------
    ConfigError
        A local session is needed, but there is no Java version that Spark 4 supports, or Delta's jars cannot be
        resolved. Or databricks-connect, which has no local Spark, cannot start a session.
    """
    provided = ("PYSPARK_GATEWAY_PORT", "DATABRICKS_RUNTIME_VERSION", "SPARK_REMOTE")
    if SparkSession.getActiveSession() or any(name in os.environ for name in provided):
        return SparkSession.builder.getOrCreate()
    if _has_databricks_connect():
        return _databricks_session()
    require_java()
    # otherwise workers run `python3` from the PATH, which may be another installation
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    verbose = logger.isEnabledFor(logging.DEBUG)
    settings = local_conf(conf or {}, verbose=verbose)
    # otherwise Spark adds its jars to Python's path, and each import and task searches them
    settings["spark.submit.pyFiles"] = ""
    if not verbose:
        _start_jvm_quietly(settings)
    return SparkSession.builder.appName("scgpt_batch").config(map={**settings}).getOrCreate()


def on_databricks() -> bool:
    """Return whether the session is one of a Databricks workspace: in its runtime, or by Databricks Connect."""
    return "DATABRICKS_RUNTIME_VERSION" in os.environ or _has_databricks_connect()


def _has_databricks_connect() -> bool:
    """Return whether databricks-connect is installed; it takes the place of pyspark."""
    return find_spec("databricks") is not None and find_spec("databricks.connect") is not None


def _databricks_session() -> SparkSession:
    """Return a session on the cluster or serverless compute that the environment or a profile names."""
    from databricks.connect import DatabricksSession

    try:
        return DatabricksSession.builder.getOrCreate()
    except Exception as exc:  # databricks-connect raises plain exceptions for a missing cluster or login
        raise ConfigError(
            f"databricks-connect cannot start a session: {in_one_line(exc)}. Log in (databricks auth login) and set "
            "DATABRICKS_CLUSTER_ID; for local Spark, use an environment with pyspark instead of databricks-connect"
        ) from exc


def _start_jvm_quietly(settings: Mapping[str, str]) -> None:
    """Start the JVM that Spark will use. What it prints until it is ready appears only if it does not start."""
    if SparkContext._gateway is not None:  # that of an earlier session
        return
    conf = SparkConf(loadDefaults=False).setAll(list(settings.items()))
    reader, writer = os.pipe()
    output = _JvmOutput(reader)
    output.start()
    try:
        gateway = launch_gateway(conf, {"stdout": writer, "stderr": writer})  # our standard output is for results
    except PySparkRuntimeError:
        os.close(writer)
        output.join(5)  # it ends when all is read; a JVM that hangs keeps the pipe open
        output.show(buffered=True)
        raise
    os.close(writer)
    output.show(buffered=False)
    SparkContext._ensure_initialized(gateway=gateway)


class _JvmOutput(Thread):
    """Reads what the JVM prints: it holds the output back at first, and later passes it on to our standard error."""

    def __init__(self, reader: int) -> None:
        super().__init__(name="output of the JVM", daemon=True)
        self._reader, self._held, self._shown, self._lock = reader, b"", False, Lock()

    def run(self) -> None:
        while data := os.read(self._reader, 1 << 16):
            with self._lock:
                if self._shown:
                    self._write(data)
                else:
                    self._held += data
        os.close(self._reader)

    def show(self, *, buffered: bool) -> None:
        """Pass on all further output, and what was buffered if `buffered`."""
        with self._lock:
            self._shown = True
            if buffered:
                self._write(self._held)

    @staticmethod
    def _write(data: bytes) -> None:
        with suppress(OSError):  # our standard error is closed; the JVM would wait for a reader
            os.write(2, data)


def separate_stderr() -> None:
    """Write standard error to the JVM's under spark-submit, which otherwise merges it into standard output."""
    if "PYSPARK_GATEWAY_PORT" in os.environ and os.path.sameopenfile(1, 2) and not os.isatty(2):
        sys.stderr = _JvmStderr(launch_gateway().jvm.System.err)


class _JvmStderr(io.TextIOBase):
    """Standard error of the JVM that started this process."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        try:
            self._stream.print(text)
        except (Py4JError, OSError):  # the JVM has exited, so write to this process' own stream
            sys.__stderr__.write(text)  # type: ignore[union-attr]
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

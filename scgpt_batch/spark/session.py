"""The Spark session of a command: the existing one, or a local one with Delta."""

import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from py4j.protocol import Py4JError
from pyspark.java_gateway import launch_gateway
from pyspark.sql import SparkSession

from scgpt_batch.errors import ConfigError
from scgpt_batch.java import HINT, OLDEST, find_java

LOCAL_CONF = Path(__file__).with_name("spark-local.conf")


def get_spark(conf: Mapping[str, str] | None = None) -> SparkSession:
    """Return the session that spark-submit, Databricks or Spark Connect provides, else create a local one.

    Parameters
    ----------
    conf
        Spark settings that add to and override those of `spark-local.conf`. An existing session keeps its own settings.

    Raises
    ------
    ConfigError
        A local session is needed, but there is no Java version that Spark 4 supports.
    """
    provided = ("PYSPARK_GATEWAY_PORT", "DATABRICKS_RUNTIME_VERSION", "SPARK_REMOTE")
    if SparkSession.getActiveSession() or any(name in os.environ for name in provided):
        return SparkSession.builder.getOrCreate()
    _require_java()
    # otherwise workers run `python3` from the PATH, which may be another installation
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    # otherwise Spark adds the jars of `spark.jars.packages` to Python's path, and each import and task searches them
    builder = SparkSession.builder.appName("scgpt_batch").config("spark.submit.pyFiles", "")
    for name, value in (_read_conf(LOCAL_CONF) | dict(conf or {})).items():
        builder = builder.config(name, value)
    return builder.getOrCreate()


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


def _read_conf(path: Path) -> dict[str, str]:
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split(None, 1) for line in lines if line and not line.startswith("#"))


def _require_java() -> None:
    java = find_java()
    if java is None:
        raise ConfigError(f"Spark needs Java, but none was found: {HINT}")
    if java.major and java.major < OLDEST:
        raise ConfigError(f"Spark 4 needs Java {OLDEST} or newer, but {java.path} is version {java.major}: {HINT}")

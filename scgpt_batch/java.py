"""The Java that Spark starts, found without importing Spark."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from scgpt_batch.errors import ConfigError

OLDEST = 17
HINT = "install Java 17 or 21 (Debian and Ubuntu: apt-get install openjdk-17-jre-headless), or set JAVA_HOME"


@dataclass(frozen=True)
class Java:
    """A Java installation.

    Attributes
    ----------
    path
        The program.
    major
        Its version, such as 17; None if it does not print one.
    output
        What it prints about itself.
    """

    path: str
    major: int | None
    output: str


def find_java() -> Java | None:
    """Return the Java of JAVA_HOME, or else of the PATH; None if there is none."""
    home = os.environ.get("JAVA_HOME")
    path = shutil.which(f"{home}/bin/java") if home else shutil.which("java")
    if path is None:
        return None
    output = subprocess.run([path, "-version"], capture_output=True, text=True, check=False, timeout=60).stderr
    match = re.search(r'version "(\d+)', output)
    return Java(path, int(match[1]) if match else None, output)


def require_java() -> None:
    """Raise ConfigError unless there is a Java version that Spark 4 supports."""
    java = find_java()
    if java is None:
        raise ConfigError(f"Spark needs Java, but none was found: {HINT}")
    if java.major and java.major < OLDEST:
        raise ConfigError(f"Spark 4 needs Java {OLDEST} or newer, but {java.path} is version {java.major}: {HINT}")

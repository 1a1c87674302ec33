"""The Java that Spark starts, found without importing Spark."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

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

"""Runs a registered version in a process of its own, with the code stored with it."""

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scgpt_batch.registry.resolve import ResolvedModel

logger = logging.getLogger(__name__)

PROCESS_SECONDS = 3600  # time limit for one version

# A version and requests (rows, params, repeats) -> the result of each (answers, seconds).
RunVersion = Callable[[ResolvedModel, Sequence[dict[str, Any]]], list[dict[str, Any]]]


class VersionFailed(Exception):
    """The process of a version ended without results."""


def run_in_own_process(model: ResolvedModel, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results of a version, computed in its own process with the code stored with it.

    Raises
    ------
    VersionFailed
        The process ended without results.
    """
    logger.info("running version %s", model.version)
    with tempfile.TemporaryDirectory() as folder:
        requests_file, results_file = Path(folder) / "requests.json", Path(folder) / "results.json"
        requests_file.write_text(json.dumps(requests), encoding="utf-8")
        # -P: without it, the folder of the script would be on the import path, with modules that could hide others
        command = [sys.executable, "-P", str(Path(__file__).with_name("run_version.py"))]
        files = [str(path) for path in (model.folder.absolute(), requests_file, results_file)]
        try:
            done = subprocess.run([*command, *files], cwd=folder, check=False,
                                  capture_output=True, text=True, timeout=PROCESS_SECONDS)  # fmt: skip
        except subprocess.TimeoutExpired as exc:
            raise VersionFailed(f"no result within {PROCESS_SECONDS} s") from exc
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            raise VersionFailed(lines[-1] if lines else f"its process exited with code {done.returncode}")
        return json.loads(results_file.read_text(encoding="utf-8"))

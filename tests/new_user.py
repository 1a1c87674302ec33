"""Go a new user's way through the README, and print the seconds of each step:  python -m tests.new_user FOLDER

A copy of the repository, `make demo`, then a file of one's own: cell vectors in an AnnData, and a UMAP as a picture.
Each command is taken from the README; the first thing that the README lacks, or that does not work, ends it.

--venv DIR takes an environment that `make setup` built before, instead of installing everything (minutes).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.paths import REPO

BUILT = (".git", ".venv*", ".demo", ".cache", "build", "dist", "mlruns", "__pycache__", "*.egg-info", ".*_cache")


class NotInReadme(Exception):
    """A step that a new user has to guess."""


def main(folder: Path, venv: Path | None) -> None:
    """Take every step in `folder`."""
    step("a copy of the repository", lambda: shutil.copytree(REPO, folder, ignore=shutil.ignore_patterns(*BUILT)))
    if venv:
        use(venv, folder)
    section = section_of(folder / "README.md", "Try it")
    step("make demo", lambda: run(the(r"^    (make demo)\b", section, "the command of the demo"), folder))
    block = the(r"^```python\n(.*?)^```$", section, "how to embed a file of one's own")
    for word in ("embed(", "tl.umap(", "pl.umap("):
        the(rf"({re.escape(word)})", block, f"a call of {word}")
    python = the(r"`(\.venv/bin/python)`", section, "which Python to start")
    step("own cells -> obsm -> UMAP", lambda: run(python, folder, block))
    picture = the(r"`(figures/\S+\.png)`", section, "where the picture is")
    if (folder / picture).stat().st_size < 10_000:
        raise SystemExit(f"{picture} is empty")
    print(f"done: {folder / picture}")


def step(name: str, run: Callable[[], object]) -> None:
    """Run a step and print how long it took."""
    started = time.monotonic()
    run()
    print(f"{time.monotonic() - started:7.1f} s  {name}", flush=True)


def run(command: str, folder: Path, script: str = "") -> None:
    """Run a command of the README in the repository's folder, with a script on standard input."""
    environment = os.environ | {"PYTHONPATH": str(folder), "MPLBACKEND": "agg"}  # no window opens
    words = ["bash", "-c", command]
    done = subprocess.run(words, cwd=folder, env=environment, input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def use(venv: Path, folder: Path) -> None:
    """Let `make` find a finished environment: files older than its stamp do not make it build one."""
    if not (venv / ".ready").exists():
        raise SystemExit(f"{venv} is not an environment that make setup has finished")
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(folder / name, (0, 0))
    (folder / ".venv").symlink_to(venv.resolve())


def section_of(readme: Path, title: str) -> str:
    """Return the text of a section."""
    return the(rf"^## {title}\n(.*?)(?=^## )", readme.read_text(encoding="utf-8"), f"a section {title!r}")


def the(pattern: str, text: str, what: str) -> str:
    """Return what the README says, or stop."""
    found = re.search(pattern, text, re.MULTILINE | re.DOTALL)
    if not found:
        raise NotInReadme(f"the README lacks {what}")
    return found[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--venv", type=Path)
    try:
        main(**vars(parser.parse_args()))
    except NotInReadme as stopped:
        sys.exit(str(stopped))

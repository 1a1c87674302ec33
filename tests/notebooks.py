"""Run the notebooks of `examples`. As a program (`make notebooks`), also store their results in them.

Stored are outputs only: no times and no paths of this machine, so that a second run changes little.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.paths import REPO

NOTEBOOKS = sorted((REPO / "examples").glob("*.ipynb"))


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in a folder that looks like `examples`; return it with its outputs. The first error is raised."""
    working = folder / "examples"
    working.mkdir(parents=True, exist_ok=True)
    if not (folder / "tests").exists():
        (folder / "tests").symlink_to(REPO / "tests")
    notebook = nbformat.read(path, as_version=4)
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPO),
        "TQDM_DISABLE": "1",  # a bar's last state has its time
        "PYTHONWARNINGS": "ignore",  # of libraries; a reader's versions have others
    }  # fmt: skip
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(working)}})
    client.execute(env=os.environ | environment)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = output.text.replace("\x1b[0m", "")  # how a shell command ends
    notebook.metadata.pop("language_info", None)
    return notebook


if __name__ == "__main__":
    for each in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as empty:
            nbformat.write(execute(each, Path(empty)), each)

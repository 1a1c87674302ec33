"""The notebooks of `examples` run from top to bottom, as a new user would run them."""

import json

import pytest

from tests.notebooks import NOTEBOOKS, execute

STORED_BYTES = 1_000_000  # all notebooks together, with their pictures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_draws_a_map(path, tmp_path):
    outputs = [output for cell in execute(path, tmp_path).cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_its_results(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    assert "/tmp" not in json.dumps(cells)  # folders of the machine that ran it


def test_stored_notebooks_are_small():
    assert len(NOTEBOOKS) == 2 and sum(path.stat().st_size for path in NOTEBOOKS) < STORED_BYTES

"""The scripts of the bundle's tasks, with the real SDK over HTTP against a simulated workspace."""

import runpy

import pytest
from databricks.sdk.errors import NotFound

from tests import databricks_bundle as bundles
from tests.databricks_workspace import Workspace, served


@pytest.fixture
def workspace(monkeypatch, tmp_path):
    """A workspace; the environment has its credentials."""
    with served(Workspace(), monkeypatch, tmp_path) as stand_in:
        yield stand_in


@pytest.fixture
def script(monkeypatch):
    """Run a script of the bundle as its task does; pauses are skipped."""

    def run(name, *words):
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        monkeypatch.setattr("sys.argv", [name, *words])
        runpy.run_path(str(bundles.BUNDLE / "tasks" / name), run_name="__main__")

    return run


def test_sync_waits_until_each_index_is_ready(script, workspace, capsys):
    workspace.indexes = {"main.scgpt.cell_index": 3, "main.scgpt.gene_index": 0}
    script("sync_indexes.py", *workspace.indexes)
    assert workspace.syncs == ["main.scgpt.cell_index", "main.scgpt.gene_index"]
    said = capsys.readouterr().out
    assert "main.scgpt.cell_index is not ready yet: Initializing" in said
    assert "main.scgpt.gene_index: 9 rows before this sync" in said


def test_sync_of_a_missing_index_fails_the_task(script, workspace):
    with pytest.raises(NotFound, match=r"Vector index main\.scgpt\.cell_index does not exist"):
        script("sync_indexes.py", "main.scgpt.cell_index")


@pytest.fixture
def version(workspace):
    """The tags of version 7 of the model."""
    workspace.add_model("main.scgpt.scgpt", 7)
    return workspace.models["main.scgpt.scgpt"].setdefault("tags", {}).setdefault("7", {})


@pytest.mark.parametrize("value", ["Approved", "approved"])
def test_approved_version_passes(script, version, value, capsys):
    version["approval"] = value
    script("check_approval.py", "main.scgpt.scgpt", "7", "approval")
    assert "version 7 of main.scgpt.scgpt is approved" in capsys.readouterr().out


@pytest.mark.parametrize("tags", [{}, {"approval": "Rejected"}, {"approval_other": "Approved"}])
def test_version_that_is_not_approved_stops_the_job(script, version, tags):
    version |= tags
    with pytest.raises(SystemExit, match=r"version 7 of main\.scgpt\.scgpt is not approved: its tag 'approval' is"):
        script("check_approval.py", "main.scgpt.scgpt", "7", "approval")

"""The version legs: each is in the workflow, and reads the runtimes' pins as they are published."""

import pytest
import yaml

from tests.paths import REPO
from tests.versions import run

WORKFLOW = REPO / ".github" / "workflows" / "test.yml"


def test_workflow_runs_every_version_leg():
    matrix = yaml.safe_load(WORKFLOW.read_text())["jobs"]["versions"]["strategy"]["matrix"]["include"]
    assert {entry["leg"] for entry in matrix} == {leg.name for leg in run.LEGS} | set(run.RUNTIME_LEGS)


def test_pins_of_each_databricks_runtime_are_read():
    assert sorted(run.RUNTIME_LEGS) == ["databricks-17.3", "databricks-18.x", "databricks-19.x"]
    for path in run.RUNTIME_LEGS.values():
        assert {"torch", "mlflow-skinny", "pandas", "numpy"} <= set(run.versions(path.read_text()))


def test_leg_without_its_python_says_so():
    assert run.attempt("old", "3.0", lambda: None) == "NOT RUN: no Python 3.0 on this machine (pyenv install 3.0)"


def test_unit_tests_of_the_legs_exist():
    assert all(len(list(REPO.glob(f"tests/*/{name}.py"))) == 1 for name in run.UNIT_TESTS)


@pytest.mark.parametrize(
    ("other", "same"), [("2", True), ("2.0", True), ("2.0.0", True), ("2.1", False), ("20", False)]
)
def test_trailing_zeros_do_not_make_another_version(other, same):
    assert run.same_version("2.0", other) is same

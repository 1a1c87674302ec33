"""Databricks runtimes: what the wheel replaces there, and which are too old."""

import subprocess
import sys

import pytest

import scgpt_batch.spark_version
from scgpt_batch.errors import ConfigError
from scgpt_batch.spark_version import require_supported_spark
from tests import databricks_bundle as bundles
from tests.versions import run

# What the wheel replaces, with the libraries that the bundle's tasks name beside it. 17.3 has an older MLflow.
REPLACED = {
    "databricks-17.3": {"mlflow-skinny", "typing-extensions"},
    "databricks-18.x": {"typing-extensions"},
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return run.build_wheel(tmp_path_factory.mktemp("dist"))


@pytest.mark.parametrize("runtime", REPLACED)
def test_wheel_replaces_only_what_it_must(wheel, tmp_path, runtime):
    task = bundles.read()["resources"]["jobs"]["nightly"]["tasks"][0]
    beside = [library["pypi"]["package"] for library in task["libraries"] if "pypi" in library]
    replaced = run.replaced(run.RUNTIME_LEGS[runtime], wheel, tmp_path / "after.txt", *beside)
    print(f"{runtime}: the install replaces {', '.join(replaced.values())}")
    assert set(replaced) == REPLACED[runtime]


def test_default_runtime_is_one_whose_versions_are_tested():
    variables = bundles.read()["variables"]
    for kind in ("gpu", "cpu"):
        assert variables[f"{kind}_runtime"]["default"] == f"18.x-{kind}-ml-scala2.13"
    assert "databricks-18.x" in run.RUNTIME_LEGS


def test_old_runtime_is_rejected_by_name(monkeypatch):
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "16.4")
    monkeypatch.setattr(scgpt_batch.spark_version, "version", lambda name: "3.5.2")
    with pytest.raises(ConfigError, match=r"Databricks runtime 16\.4 has Spark 3\.5\.2.*ML runtime 17\.3"):
        require_supported_spark()


def test_commands_on_an_old_runtime_fail_before_they_import_spark():
    code = (
        "import importlib.metadata as m\n"
        "found, m.version = m.version, lambda name: '3.5.2' if name == 'pyspark' else found(name)\n"
        "from scgpt_batch.cli.main import main\n"
        "raise SystemExit(main(['maintain', '--table', 'a.b.c']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Spark 3.5.2, which is not supported" in done.stderr

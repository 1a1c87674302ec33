"""`doctor`: one line per check, exit code 2 if one fails, and a remedy for what failed."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pytest
from deltalake import write_deltalake

import scgpt_batch.spark_version
from scgpt_batch.cli import doctor as module
from scgpt_batch.cli.doctor import Check, DoctorResult
from scgpt_batch.cli.main import OK, WRONG_USAGE
from tests.helpers import mlflow_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An empty MLflow store in use."""
    with mlflow_store(tmp_path_factory.mktemp("store")):
        yield


@pytest.fixture
def check(run, store, monkeypatch):
    """Run `doctor`; return its exit code, its checks by name, and its status. The machine may be full."""
    monkeypatch.setattr(module, "FREE_DISK_GB", 0)
    monkeypatch.setattr(module, "FREE_MEMORY_GB", 0)

    def check(*arguments):
        code, result, _ = run("doctor", *arguments)
        return code, {found["name"]: found for found in result["checks"]}, result["status"]

    return check


def test_a_working_environment_is_ok(check, tmp_path):
    write_deltalake(str(tmp_path / "t"), pa.table({"a": [1]}))
    code, checks, status = check("--tables", f"delta.`{tmp_path / 't'}`")
    assert (code, status) == (OK, "ok")
    assert [name for name, found in checks.items() if not found["ok"] or found["remedy"]] == []
    assert set(checks) >= {
        "Python", "Java", "Spark", "Delta", "torch", "GPU", "attention", "MLflow tracking", "MLflow registry", "table",
        "disk", "memory",
    }  # fmt: skip


def test_what_is_missing_is_named_with_its_remedy(check, tmp_path, monkeypatch):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nowhere"))
    code, checks, status = check("--model-uri", "models:/nothing@champion", "--tables", f"delta.`{tmp_path / 'no'}`")
    assert (code, status) == (WRONG_USAGE, "failed")
    failed = {name: found for name, found in checks.items() if not found["ok"]}
    assert set(failed) == {"Java", "model", "table"}
    assert "JAVA_HOME" in failed["Java"]["remedy"] and "openjdk-17" in failed["Java"]["remedy"]
    assert "models:/nothing@champion" in failed["model"]["detail"]
    assert "no Delta table at" in failed["table"]["detail"]


def test_old_java_and_spark_are_not_enough(check, tmp_path, monkeypatch):
    monkeypatch.setattr(scgpt_batch.spark_version, "version", lambda name: "3.5.2")
    java = tmp_path / "jdk" / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019-01-15' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jdk"))
    _, checks, _ = check()
    assert not checks["Java"]["ok"] and "11.0.2" in checks["Java"]["detail"]
    assert not checks["Spark"]["ok"] and "ML runtime 17.3" in checks["Spark"]["remedy"]


def test_gpu_that_torch_cannot_use_is_a_failure(check, tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 470.1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpu = check()[1]["GPU"]
    assert not gpu["ok"] and "driver 470.1" in gpu["detail"] and "torch build for CUDA" in gpu["remedy"]


def test_torch_that_crashes_is_a_failure_of_its_line(check, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import os; os.abort()")
    monkeypatch.syspath_prepend(tmp_path)
    code, checks, _ = check()
    assert code == WRONG_USAGE and "crashed" in checks["torch"]["detail"]
    assert [name for name, found in checks.items() if not found["ok"]] == ["torch"]


def test_little_disk_and_memory_are_failures(check, monkeypatch):
    monkeypatch.setattr(module, "FREE_DISK_GB", 10**6)
    monkeypatch.setattr(module, "FREE_MEMORY_GB", 10**6)
    checks = check()[1]
    assert not checks["disk"]["ok"] and "SPARK_LOCAL_DIRS" in checks["disk"]["remedy"]
    assert not checks["memory"]["ok"]


def test_remedies_stand_below_their_line():
    checks = [Check("Python", True, "3.11"), Check("Java", False, "none", "install Java")]
    lines = DoctorResult(exit_code=2, status="failed", checks=checks).lines()
    assert lines == ["ok    Python  3.11", "FAIL  Java    none", "              -> install Java"]


def test_doctor_leaves_no_files(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from scgpt_batch.cli.main import main; raise SystemExit(main(['doctor', '--json']))"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert json.loads(done.stdout)["checks"], done.stderr
    assert list(tmp_path.iterdir()) == []

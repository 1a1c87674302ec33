"""The command line by itself: what is documented, and what a wrong call says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scgpt_batch import cli
from scgpt_batch.cli import COMMANDS, FAILED, WRONG_USAGE, _fields, main

REPO = Path(__file__).parents[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name):
    assert f"scgpt-batch {name}" in (REPO / "README.md").read_text() or f"`{name}`" in (REPO / "README.md").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_has_help(name):
    assert [field for field, info in _fields(COMMANDS[name]).items() if not info.description] == []


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["register", "--name", "x"], "--checkpoint"),
        (["register", "--name", "x", "--checkpoint", "/nowhere"], "/nowhere"),
        (["embed"], "--model-uri, --input-table, --output-table"),
        (["demo-checkpoint", "--h5ad", "/nowhere.h5ad", "--out", "/tmp/never"], "/nowhere.h5ad"),
    ],
)
def test_what_is_missing_is_named_in_one_line(capfd, argv, wanted):
    assert main(argv) == WRONG_USAGE
    told = capfd.readouterr()
    assert wanted in told.err.strip().splitlines()[-1] and "Traceback" not in told.err and told.out == ""


def test_a_java_error_is_told_with_its_first_cause(tmp_path, capfd, monkeypatch):
    def fail(*_):
        trace = ": SparkException: Task failed", "\tat a.b", "Caused by: FileIOException: x", "Caused by: No space left"
        raise RuntimeError("An error occurred while calling o1.save.\n" + "\n".join(trace))

    monkeypatch.setattr(cli, "_run", fail)
    assert main(["summary", "--output-table", "t"]) == FAILED
    assert "SparkException: Task failed: No space left (--debug" in capfd.readouterr().err


def test_an_unknown_section_or_setting_of_the_file_is_named(tmp_path, capfd):
    config = tmp_path / "c.yml"
    for text, wanted in (("embedd: {}", "embedd"), ("ingest: {tabel: x}", "tabel"), ("- 1", "sections")):
        config.write_text(text)
        assert main(["ingest", "--config", str(config)]) == WRONG_USAGE
        assert wanted in capfd.readouterr().err


def test_without_java_the_one_command_to_run_is_said(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("PATH", "JAVA_HOME")} | {"PATH": str(tmp_path)}
    command = [Path(sys.executable).with_name("scgpt-batch"), "summary", "--output-table", "t"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == WRONG_USAGE
    assert "openjdk-17" in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr

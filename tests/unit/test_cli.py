"""The command line by itself: what is documented, and what a wrong call says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scgpt_batch.cli import main as cli
from scgpt_batch.cli.main import COMMANDS, FAILED, WRONG_USAGE, _fields, _settings, main
from scgpt_batch.errors import ConfigError
from tests.paths import REPO


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
        (["demo-checkpoint", "--h5ad", "tests/data/pbmc3k.h5ad", "--out", "/dev/null/x"], "/dev/null/x"),
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


def required(name):
    """Values of the settings that a command cannot do without."""
    fields = {field: info for field, info in COMMANDS[name].settings.model_fields.items() if info.is_required()}
    given = {field: ["x"] if cli._is_list(info) else "x" for field, info in fields.items()}
    return given | ({"model_uri": "models:/a.b.c/1"} if name == "deploy" else {})


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("config", sorted((REPO / "conf").glob("*.yml")), ids=lambda path: path.name)
def test_every_command_accepts_every_config_file(name, config):
    _settings(COMMANDS[name], name, required(name), str(config))


WRONG_FORMS = ["[1, {a: b}]", "{a: [1]}", "2026-01-01", "-7", ".nan", "'two words'", "true"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_takes_a_file_value_or_names_itself(tmp_path, name):
    config, refused = tmp_path / "c.yml", 0
    for field in _fields(COMMANDS[name]):
        given = {key: value for key, value in required(name).items() if key != field}
        for value in WRONG_FORMS:
            config.write_text(f"{name}: {{{field}: {value}}}")
            try:
                _settings(COMMANDS[name], name, given, str(config))
            except ConfigError as exc:
                refused += 1
                assert field in str(exc).replace("-", "_"), (field, value)
    assert refused > 3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_takes_an_environment_value_or_names_itself(monkeypatch, name):
    for field in _fields(COMMANDS[name]):
        given = {key: value for key, value in required(name).items() if key != field}
        for value in ("", "foo", "-7", "=x", "nan"):
            with monkeypatch.context() as patch:
                patch.setenv(f"SCGPT_BATCH_{field.upper()}", value)
                try:
                    _settings(COMMANDS[name], name, given, None)
                except ConfigError as exc:
                    assert field in str(exc).lower().replace("-", "_"), (field, value)


def test_a_spark_setting_without_a_value_is_wrong_usage(monkeypatch, capfd):
    monkeypatch.setenv("SCGPT_BATCH_SPARK_CONF", "foo")
    assert main(["summary", "--output-table", "t"]) == WRONG_USAGE
    assert "SCGPT_BATCH_SPARK_CONF is 'foo': 'foo' must be NAME=VALUE" in capfd.readouterr().err


def test_file_values_mean_what_flags_mean(tmp_path):
    config = tmp_path / "c.yml"
    config.write_text(
        "common: {spark_conf: {a: 1, b: true, c: x, d: 0.5}}\nsummary: {genes: CD3D, neighbours: null}\ningest:\n"
    )
    (settings,) = _settings(COMMANDS["summary"], "summary", {"output_table": "t"}, str(config))
    assert settings.spark_conf == {"a": "1", "b": "true", "c": "x", "d": "0.5"}
    assert settings.genes == ("CD3D",) and settings.neighbours == 5


@pytest.mark.parametrize("content", [b"ingest: [", b"\xff\xfe\x00", b"a: b: c"])
def test_a_config_file_that_is_not_yaml_is_wrong_usage(tmp_path, capfd, content):
    (tmp_path / "c.yml").write_bytes(content)
    assert main(["ingest", "--config", str(tmp_path / "c.yml")]) == WRONG_USAGE
    assert "c.yml is not YAML: " in capfd.readouterr().err


def test_without_java_the_one_command_to_run_is_said(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("PATH", "JAVA_HOME")} | {"PATH": str(tmp_path)}
    command = [Path(sys.executable).with_name("scgpt-batch"), "summary", "--output-table", "t"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == WRONG_USAGE
    assert "openjdk-17" in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr

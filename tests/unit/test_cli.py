"""The command line by itself: its options and help, where settings come from, and what a wrong call says."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal, get_args, get_origin

import pyarrow as pa
import pytest
from deltalake import write_deltalake

import scgpt_batch
from scgpt_batch.cli.commands import COMMANDS
from scgpt_batch.cli.load_settings import is_list
from scgpt_batch.cli.main import FAILED, OK, WRONG_USAGE, main, parse, read_settings
from scgpt_batch.cli.options import COMMON_OPTIONS, GROUPS
from scgpt_batch.command_result import CommandResult
from scgpt_batch.errors import ConfigError
from scgpt_batch.parameters import PRESETS, Parameters
from scgpt_batch.settings import EmbedSettings
from tests.paths import REPO

EMBED = ["embed", "--model-uri", "models:/m/1", "--input-table", "a", "--output-table", "b"]


def settings_of(*argv, config=None):
    """Settings (and parameters) of a command line."""
    given = vars(parse(argv))
    flags = {key: value for key, value in given.items() if key not in ("command", *COMMON_OPTIONS)}
    return read_settings(given["command"], flags, config or given["config"])


# Help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_has_help(name):
    assert [field for field, info in COMMANDS[name].fields.items() if not info.description] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_is_in_one_group(name):
    grouped = [field for metavars in GROUPS.values() for field in metavars]
    assert len(grouped) == len(set(grouped)) and set(COMMANDS[name].fields) <= set(grouped)


def test_groups_name_no_unknown_setting():
    known = {field for command in COMMANDS.values() for field in command.fields}
    assert {field for metavars in GROUPS.values() for field in metavars} == known


def help_of(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_shows_groups_and_metavars(capsys):
    text = help_of("embed", capsys)
    titles = ["input and output:", "model:", "preprocessing:", "run control:", "Spark and MLflow:"]
    assert [title for title in titles if f"\n{title}\n" not in text] == []
    for option in ("--input-table TABLE", "--wave-cells N", "--genes GENE [GENE ...]", "--checkpoint-location PATH"):
        assert option in text


@pytest.mark.parametrize("name", COMMANDS)
def test_example_of_the_help_is_a_valid_call(name, capsys):
    _, _, example = help_of(name, capsys).partition("example:\n")
    program, *words = shlex.split(example.replace("\\\n", ""))
    assert program == "scgpt-batch" and words[0] == name
    settings_of(*words)


def test_starting_a_command_imports_no_large_library():
    large = "{'anndata', 'mlflow', 'numpy', 'pandas', 'pyarrow', 'pyspark', 'scanpy', 'scipy', 'torch'}"
    code = f"import sys, scgpt_batch.cli, scgpt_batch.cli.doctor; sys.exit(str(set(sys.modules) & {large} or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr.strip() == ""


def test_an_embed_run_with_nothing_to_do_imports_no_torch():
    """The job's module imports what waves need only when there are rows to embed: it takes seconds."""
    large = "{'numba', 'scanpy', 'scipy.stats', 'sklearn', 'torch'}"
    code = f"import sys, scgpt_batch.spark.embed; sys.exit(str(set(sys.modules) & {large} or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr.strip() == ""


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"scgpt_batch {scgpt_batch.__version__}\n"


@pytest.mark.parametrize(("line", "wanted"), [("scgpt-batch emb", "embed"), ("scgpt-batch embed --mode c", "cell")])
def test_shell_completes_commands_options_and_values(tmp_path, line, wanted):
    found = tmp_path / "completions"
    environment = os.environ | {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(found), "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line, "COMP_POINT": str(len(line)),
    }  # fmt: skip
    code = "import sys; sys.argv = ['scgpt-batch']; from scgpt_batch.cli import entry_point; entry_point()"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    assert wanted in found.read_text().split()


# Options that a command can use


@pytest.mark.parametrize(
    "option",
    ["--input-data-path", "--use-key", "--embsize", "--nhead", "--d-hid", "--nlayers", "--n-layers-cls",
     "--result-binned-key", "--encoding", "--on-error"],
)  # fmt: skip
def test_embed_has_no_options_that_only_the_model_can_use(capsys, option):
    assert option[2:].replace("-", "_") in Parameters.model_fields
    with pytest.raises(SystemExit) as end:
        main([*EMBED, option, "1"])
    assert end.value.code == WRONG_USAGE and f"unknown option {option}" in capsys.readouterr().err


def test_variable_of_an_option_that_embed_lacks_is_ignored(monkeypatch):
    monkeypatch.setenv("SCGPT_BATCH_EMBSIZE", "7")
    assert settings_of(*EMBED)[1].embsize is None


@pytest.mark.parametrize("name", ["demo-checkpoint", "register", "serve", "deploy"])
def test_commands_without_spark_have_no_spark_options(name):
    assert "spark_conf" not in COMMANDS[name].fields


# The preset


THREE_FLAGS = ["--data-is-raw", "true", "--log1p", "true", "--hvg-flavor", "seurat_v3"]


@pytest.mark.parametrize("mode", ["static", "contextual", "cell"])
def test_preset_equals_its_three_flags(mode):
    by_preset = settings_of(*EMBED, "--mode", mode, "--preset", "counts")[1]
    by_flags = settings_of(*EMBED, "--mode", mode, *THREE_FLAGS)[1]
    assert by_preset == by_flags and by_preset.params_hash() == by_flags.params_hash()


def test_explicit_parameters_win_over_the_preset(tmp_path, monkeypatch):
    config = tmp_path / "c.yml"
    config.write_text("embed: {preset: counts, log1p: false}")
    monkeypatch.setenv("SCGPT_BATCH_DATA_IS_RAW", "false")
    parameters = settings_of(*EMBED, "--hvg-flavor", "seurat", config=str(config))[1]
    assert (parameters.log1p, parameters.data_is_raw, parameters.hvg_flavor) == (False, False, "seurat")


def test_presets_of_the_settings_are_defined():
    assert set(get_args(EmbedSettings.model_fields["preset"].annotation)) == set(PRESETS)


# Where settings come from


def test_precedence_is_flag_variable_section_common(tmp_path, monkeypatch):
    config = tmp_path / "c.yml"
    config.write_text("common: {neighbours: 1, genes: [A]}\nsummary: {neighbours: 2, output_table: t}")
    (from_section,) = settings_of("summary", config=str(config))
    assert (from_section.neighbours, from_section.genes, from_section.output_table) == (2, ("A",), "t")
    monkeypatch.setenv("SCGPT_BATCH_NEIGHBOURS", "3")
    assert settings_of("summary", config=str(config))[0].neighbours == 3
    assert settings_of("summary", "--neighbours", "4", config=str(config))[0].neighbours == 4


def test_variables_of_lists_and_named_values_are_words(monkeypatch):
    monkeypatch.setenv("SCGPT_BATCH_GENES", "CD3D LYZ")
    monkeypatch.setenv("SCGPT_BATCH_SPARK_CONF", "a=1 b=x=y")
    (settings,) = settings_of("summary", "--output-table", "t")
    assert (settings.genes, settings.spark_conf) == (("CD3D", "LYZ"), {"a": "1", "b": "x=y"})


def test_spark_settings_of_several_sources_are_merged(tmp_path, monkeypatch):
    config = tmp_path / "c.yml"
    config.write_text("common: {spark_conf: {a: 1, b: 1, c: 1}}")
    monkeypatch.setenv("SCGPT_BATCH_SPARK_CONF", "b=2 c=2")
    (settings,) = settings_of("summary", "--output-table", "t", "--spark-conf", "c=3", config=str(config))
    assert settings.spark_conf == {"a": "1", "b": "2", "c": "3"}


def test_common_section_can_have_settings_of_other_commands(tmp_path):
    config = tmp_path / "c.yml"
    config.write_text("common: {spark_conf: {a: 1}, tracking_uri: x}")
    settings_of("demo-checkpoint", "--h5ad", "a", "--out", "b", config=str(config))


def required(name):
    """Values of the settings that a command cannot do without."""
    fields = {field: info for field, info in COMMANDS[name].settings.model_fields.items() if info.is_required()}
    given = {field: ["x"] if is_list(info) else "x" for field, info in fields.items()}
    return given | ({"model_uri": "models:/a.b.c/1"} if name == "deploy" else {})


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("config", sorted((REPO / "conf").glob("*.yml")), ids=lambda path: path.name)
def test_every_command_accepts_every_config_file(name, config):
    read_settings(name, required(name), str(config))


WRONG_FORMS = ["[1, {a: b}]", "{a: [1]}", "2026-01-01", "-7", ".nan", "'two words'", "true"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_reads_its_file_value(tmp_path, name):
    config, rejected = tmp_path / "c.yml", 0
    for field in COMMANDS[name].fields:
        given = {key: value for key, value in required(name).items() if key != field}
        for value in WRONG_FORMS:
            config.write_text(f"{name}: {{{field}: {value}}}")
            try:
                read_settings(name, given, str(config))
            except ConfigError as exc:
                rejected += 1
                assert field in str(exc).replace("-", "_"), (field, value)
    assert rejected > 3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_reads_its_environment_variable(monkeypatch, name):
    for field in COMMANDS[name].fields:
        given = {key: value for key, value in required(name).items() if key != field}
        for value in ("", "foo", "-7", "=x", "nan"):
            with monkeypatch.context() as patch:
                patch.setenv(f"SCGPT_BATCH_{field.upper()}", value)
                try:
                    read_settings(name, given, None)
                except ConfigError as exc:
                    assert field in str(exc).lower().replace("-", "_"), (field, value)


def test_a_spark_setting_without_a_value_is_wrong_usage(monkeypatch, capfd):
    monkeypatch.setenv("SCGPT_BATCH_SPARK_CONF", "foo")
    assert main(["summary", "--output-table", "t"]) == WRONG_USAGE
    assert "SCGPT_BATCH_SPARK_CONF is 'foo': 'foo' must be NAME=VALUE" in capfd.readouterr().err


def test_file_values_equal_flag_values(tmp_path):
    config = tmp_path / "c.yml"
    config.write_text(
        "common: {spark_conf: {a: 1, b: true, c: x, d: 0.5}}\nsummary: {genes: CD3D, neighbours: null}\ningest:\n"
    )
    (settings,) = read_settings("summary", {"output_table": "t"}, str(config))
    assert settings.spark_conf == {"a": "1", "b": "true", "c": "x", "d": "0.5"}
    assert settings.genes == ("CD3D",) and settings.neighbours == 5


@pytest.mark.parametrize("content", [b"ingest: [", b"\xff\xfe\x00", b"a: b: c"])
def test_a_config_file_that_is_not_yaml_is_wrong_usage(tmp_path, capfd, content):
    (tmp_path / "c.yml").write_bytes(content)
    assert main(["ingest", "--config", str(tmp_path / "c.yml")]) == WRONG_USAGE
    assert "c.yml is not YAML: " in capfd.readouterr().err


# Standard output


@dataclass(frozen=True, kw_only=True)
class Rows(CommandResult):
    rows: int = 3

    def lines(self):
        return ["3 rows", "forged\nline"]


@pytest.fixture
def run_rows(monkeypatch, capsys):
    """Run a command that returns 3 rows, in a terminal or not; gives its standard output."""

    def run(*words, terminal, name="maintain"):
        monkeypatch.setitem(COMMANDS, name, replace(COMMANDS[name], run=lambda _: Rows()))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        option = "--output-table" if name == "summary" else "--table"
        assert main([name, option, "t", *words]) == OK
        return capsys.readouterr().out.splitlines()

    return run


def test_terminal_shows_a_summary_before_the_json_line(run_rows):
    assert run_rows(terminal=True) == ["3 rows", "forged\\nline", '{"rows": 3}']


def test_pipe_gets_the_json_line_alone(run_rows):
    assert run_rows(terminal=False) == ['{"rows": 3}']


def test_json_option_prints_the_json_line_alone(run_rows):
    assert run_rows("--json", terminal=True) == ['{"rows": 3}']
    assert run_rows("--json", terminal=False, name="summary") == ['{"rows": 3}']


def test_summary_is_readable_in_a_pipe_too(run_rows):
    assert run_rows(terminal=False, name="summary")[0] == "3 rows"


# Wrong calls


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
    found = capfd.readouterr()
    assert wanted in found.err.strip().splitlines()[-1] and "Traceback" not in found.err and found.out == ""


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--mode", "dynamic"], "'mode'"),
        (["--min-coverage", "7"], "'min_coverage'"),
        (["--group-by", "cell_type"], "contextual"),
        (["--trigger", "available-now"], "checkpoint_location"),
        (["--config", "/nowhere.yml"], "/nowhere.yml"),
    ],
)
def test_invalid_setting_is_reported_before_spark_starts(capfd, monkeypatch, words, wanted):
    monkeypatch.setattr("scgpt_batch.spark.session.get_spark", lambda conf: pytest.fail("Spark was started"))
    assert main([*EMBED, *words]) == WRONG_USAGE
    found = capfd.readouterr()
    last = found.err.strip().splitlines()[-1]
    assert last.startswith("scgpt-batch: ") and wanted in last and "Traceback" not in found.err and found.out == ""


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["embd"], "unknown command 'embd': did you mean 'embed'?"),
        (["xyz"], "unknown command 'xyz'; known: 'demo-checkpoint', 'ingest', "),
        (["embed", "--modle", "cell"], "unknown option --modle: did you mean '--mode'?"),
        (["embed", "--cells_per_rows=1"], "unknown option --cells_per_rows\n"),
    ],
)
def test_misspelt_command_or_option_gets_a_suggestion(capsys, argv, wanted):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == WRONG_USAGE and wanted in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--mode", "contxtual"], "parameter 'mode': .*, got 'contxtual': did you mean 'contextual'\\?"),
        (["--hvg-flavor", "seurat-v3"], "did you mean 'seurat_v3'"),
        (["--preset", "count"], "setting 'preset': .*, got 'count': did you mean 'counts'\\?"),
        (["--trigger", "availablenow"], "did you mean 'available-now'"),
    ],
)
def test_misspelt_value_gets_a_suggestion(words, wanted):
    with pytest.raises(ConfigError, match=wanted):
        settings_of(*EMBED, *words)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_misspelt_choice_gets_a_suggestion(name):
    for field, info in COMMANDS[name].fields.items():
        if get_origin(info.annotation) is Literal:
            choice = get_args(info.annotation)[-1]
            with pytest.raises(ConfigError, match=f"did you mean '{re.escape(choice)}'"):
                read_settings(name, required(name) | {field: f"{choice}x"}, None)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("embedd: {}", "c.yml: unknown section 'embedd': did you mean 'embed'?"),
        ("ingest: {tabel: x}", "c.yml, section 'ingest': unknown setting 'tabel': did you mean 'table'?"),
        ("common: {traking_uri: x}", "c.yml, section 'common': unknown setting 'traking_uri': did you mean 'tracking_"),
        ("- 1", "c.yml must contain sections of settings: common, demo-checkpoint, "),
    ],
)
def test_unknown_section_or_setting_of_the_file_is_named(tmp_path, capfd, text, wanted):
    config = tmp_path / "c.yml"
    config.write_text(text)
    assert main(["ingest", "--config", str(config)]) == WRONG_USAGE
    assert wanted in capfd.readouterr().err


def test_a_java_error_is_shown_with_its_first_cause(capfd, monkeypatch):
    def fail(*_):
        trace = ": SparkException: Task failed", "\tat a.b", "Caused by: FileIOException: x", "Caused by: No space left"
        raise RuntimeError("An error occurred while calling o1.save.\n" + "\n".join(trace))

    monkeypatch.setitem(COMMANDS, "summary", replace(COMMANDS["summary"], run=fail))
    assert main(["summary", "--output-table", "t"]) == FAILED
    assert "SparkException: Task failed: No space left (--debug" in capfd.readouterr().err


def test_summary_of_a_path_needs_no_java(tmp_path):
    stamps = {name: pa.array(["x"]) for name in ("model_name", "model_version", "params_hash", "adata_id")}
    at = pa.array([datetime(2026, 1, 1, tzinfo=UTC)])
    vectors = {"mode": ["static"], "gene": ["CD3D"], "embedding": pa.array([[1.0]]), "embedded_at": at}
    write_deltalake(str(tmp_path / "t"), pa.table(stamps | vectors))
    report = {"mode": ["static"], "status": ["ok"], "cells": [7], "at": at}
    write_deltalake(str(tmp_path / "t_ledger"), pa.table(stamps | report))
    command = [sys.executable, "-c", "from scgpt_batch.cli import entry_point; entry_point()"]
    command += ["summary", "--output-table", f"delta.`{tmp_path}/t`", "--json"]
    environment = os.environ | {"JAVA_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (OK, "")
    assert json.loads(done.stdout)["cells"] == 7


def test_without_java_the_one_command_to_run_is_named(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("PATH", "JAVA_HOME")} | {"PATH": str(tmp_path)}
    command = [sys.executable, "-c", "from scgpt_batch.cli import entry_point; entry_point()"]
    command += ["summary", "--output-table", "t"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == WRONG_USAGE
    assert "openjdk-17" in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr

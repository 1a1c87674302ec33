"""Every call of `scgpt-batch` in the documents is one that the command line takes, and every command is shown."""

import re
from dataclasses import replace

import mlflow
import pytest

from scgpt_batch.cli.main import COMMANDS, main
from tests.documents import DOCUMENTS, calls, mentions
from tests.paths import REPO

CALLS = [(document, words) for document in DOCUMENTS for words in calls(document)]
MENTIONS = [(document, words) for document in DOCUMENTS for words in mentions(document)]


class Accepted(BaseException):
    """The command was about to run."""


@pytest.fixture
def accepted(monkeypatch, capsys):
    """A function: whether the command line takes these words. Nothing runs."""

    def run(*settings):
        raise Accepted

    for name, command in COMMANDS.items():
        monkeypatch.setitem(COMMANDS, name, replace(command, run=run))
    for name in ("set_tracking_uri", "set_registry_uri"):
        monkeypatch.setattr(mlflow, name, lambda uri: None)

    def accepted(words):
        try:
            main(words)
        except Accepted:
            return True
        except SystemExit:
            pass
        pytest.fail(f"scgpt-batch {' '.join(words)}\n{capsys.readouterr().err}")

    return accepted


@pytest.mark.parametrize(("document", "words"), CALLS, ids=lambda value: getattr(value, "name", None))
def test_a_call_in_a_shell_block_is_accepted(accepted, document, words):
    assert accepted(words)


def options(name, capsys):
    """The options that the help of a command shows."""
    with pytest.raises(SystemExit):
        main([name, "--help"])
    return set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))


@pytest.mark.parametrize(("document", "words"), MENTIONS, ids=lambda value: getattr(value, "name", None))
def test_a_call_in_a_sentence_names_a_command_and_its_options(capsys, document, words):
    name, *rest = words.split()
    if name != "COMMAND":  # any of them
        assert set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", " ".join(rest))) <= options(name, capsys)


def test_a_misspelt_option_is_noticed(accepted):
    with pytest.raises(pytest.fail.Exception, match="--tabel"):
        accepted(["ingest", "--input", "a.h5ad", "--tabel", "t"])


def test_the_readme_lists_the_commands_and_no_others():
    section = (REPO / "README.md").read_text(encoding="utf-8").split("\n## Commands\n")[1].split("\n## ")[0]
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert {name for cell in first_cells for name in re.findall("`([^`]+)`", cell)} == set(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"demo-checkpoint"}))  # which `make demo` calls
def test_every_command_has_a_call_in_a_document(name):
    assert name in {words[0] for _, words in CALLS} | {words.split()[0] for _, words in MENTIONS}

"""The documentation site builds without a warning, and its pages need nothing from a network."""

import os
import re
import subprocess
import sys

import pytest

import scgpt_batch
from scgpt_batch.cli.commands import COMMANDS
from scgpt_batch.cli.options import flag
from scgpt_batch.monitoring import queries
from scgpt_batch.parameters import Parameters
from tests.paths import REPO


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; without a network, a proxy that does not exist would be noticed."""
    folder = tmp_path_factory.mktemp("site")
    closed = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(command, cwd=REPO, env=os.environ | closed, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    return folder


def page(site, name):
    return (site / f"{name}.html").read_text(encoding="utf-8")


def test_every_document_is_a_page(site):
    names = [path.stem for path in (REPO / "docs").glob("*.md")]
    assert [name for name in names if not (site / f"{name}.html").exists()] == []
    home = page(site, "index")
    assert [name for name in names if f'href="{name}.html"' not in home and name != "index"] == []


def test_pages_load_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="(https?:[^"]*)"', path.read_text())
        assert loaded == [], path


def test_reference_has_every_command_and_flag(site):
    text = page(site, "reference/commands")
    for name, command in COMMANDS.items():
        section = text.split(f'<h2 id="{name}"')[1].split("<h2 ")[0]
        assert [option for option in map(flag, command.fields) if f"<code>{option}</code>" not in section] == []


def test_reference_has_every_parameter_and_public_name(site):
    text = page(site, "reference/parameters")
    assert [name for name in Parameters.model_fields if f"<code>{name}</code>" not in text] == []
    text = page(site, "reference/python")
    assert [name for name in scgpt_batch.__all__ if f"sb.{name}" not in text] == []


def test_reference_has_every_query(site):
    text = page(site, "reference/sql")
    assert [name for name in queries.names() if f'<h2 id="{name}"' not in text] == []


def test_a_table_cell_is_not_cut_by_a_bar(site):
    for path in site.rglob("*.html"):
        for table in re.findall(r"<table>.*?</table>", path.read_text(), re.DOTALL):
            columns = {row.count("<td") for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)} - {0}
            assert columns == {table.count("<th>") or table.count("<th")}, path

"""Where paths and URIs are accepted: volumes as `dbfs:/Volumes/…` everywhere, other storage where files are counts."""

import sys

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import scgpt_batch as sb
from scgpt_batch.cli.main import WRONG_USAGE
from scgpt_batch.errors import ConfigError, PayloadError
from scgpt_batch.inference.row_reader import allowed_path
from scgpt_batch.io.locations import find_sources
from scgpt_batch.serving.inference_log import table_path
from scgpt_batch.webpage import page

VOLUME = "/Volumes/main/lab/in"
COMMANDS = {
    "config": ("doctor", "--config"),
    "demo-checkpoint": ("demo-checkpoint", "--out", "out", "--h5ad"),
    "export": ("export", "--out", "a.h5ad", "--embeddings"),
    "register": ("register", "--name", "scgpt", "--checkpoint"),
}


@pytest.mark.parametrize("command", ("demo-checkpoint", "export", "register"))
def test_commands_accept_volumes_with_dbfs(run, command):
    code, _, err = run(*COMMANDS[command], f"dbfs:{VOLUME}/a")
    assert (code, f"{VOLUME}/a" in err, "dbfs:" in err) == (WRONG_USAGE, True, False)


@pytest.mark.parametrize("command", ("config", "demo-checkpoint", "register"))
def test_commands_say_what_to_do_with_other_storage(run, command):
    code, _, err = run(*COMMANDS[command], "s3://lab/a")
    assert code == WRONG_USAGE
    assert "s3://lab/a is not a path on this machine: copy it here first" in err and "/Volumes/" in err


def test_reports_are_on_this_machine():
    with pytest.raises(ConfigError, match=f"folder {VOLUME} does not exist"):
        page.check(f"dbfs:{VOLUME}/health.html")
    with pytest.raises(ConfigError, match=r"report s3://lab/health\.html is not a path on this machine"):
        page.check("s3://lab/health.html")


def test_python_accepts_volumes_with_dbfs():
    with pytest.raises(ConfigError, match=f"no model at '{VOLUME}/scGPT_human'"):
        sb.load_model(f"dbfs:{VOLUME}/scGPT_human")
    with pytest.raises(ConfigError, match=f"no Delta table at {VOLUME}/cells"):
        sb.read_embeddings(f"delta.`dbfs:{VOLUME}/cells`")
    with pytest.raises(PayloadError, match=r"is not an \.h5ad file"):  # below the root, but it does not exist
        allowed_path(f"dbfs:{VOLUME}/a.h5ad", [VOLUME])


def test_inference_table_may_be_in_a_volume():
    assert table_path(f"delta.`dbfs:{VOLUME}/payload`") == f"{VOLUME}/payload"
    assert table_path("delta.`abfss://lab@account.dfs.core.windows.net/payload`").startswith("abfss://")


class Azure(MemoryFileSystem):
    """As adlfs: a name starts with the container and has lost the account."""

    protocol = "abfss"
    root_marker = ""

    @classmethod
    def _strip_protocol(cls, path):
        container, _, name = path.removeprefix("abfss://").partition("/")
        return f"{container.partition('@')[0]}/{name}".rstrip("/")

    def exists(self, path, **kwargs):
        return True

    def glob(self, path, **kwargs):
        return [path.replace("*", name) for name in ("b", "a")]


def test_azure_sources_keep_their_storage_account(monkeypatch):
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "abfss", Azure)
    place = "abfss://lab@account.dfs.core.windows.net/run7"
    assert find_sources([f"{place}/c.h5ad"]) == [f"{place}/c.h5ad"]
    assert find_sources([f"{place}/*.h5ad"]) == [f"{place}/a.h5ad", f"{place}/b.h5ad"]

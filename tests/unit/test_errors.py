"""Errors in one line, no password in anything that is printed, and no log line but the logger's."""

import copy
import io
import logging
import os

import pytest

from scgpt_batch.cli.main import main
from scgpt_batch.errors import (
    ConfigError,
    FileError,
    PayloadError,
    PreprocessError,
    SafeLogFilter,
    in_one_line,
    masked,
    printable,
    row_errors,
)
from scgpt_batch.inference.results import RowReport, warning_kind

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"postgresql://ann:{SECRET}@db/mlflow", "postgresql://***@db/mlflow"),
        (f"postgresql://ann:{SECRET}@{SECRET}@db", "postgresql://***@db"),
        (f"http://ann:{SECRET}/{SECRET}@host:5000/x", "http://***@host:5000/x"),
        (f"https://{SECRET}@host", "https://***@host"),
        (f"mysql+pymysql://root:{SECRET}@db: failed", "mysql+pymysql://***@db: failed"),
        (f"'http://a:{SECRET}@b' and http://c:{SECRET}@d", "'http://***@b' and http://***@d"),
        (f"https://host/?a=1&sslpassword={SECRET}&b=2", "https://host/?a=1&sslpassword=***&b=2"),
        ("https://host:5000/path, mail to ann@example.org", "https://host:5000/path, mail to ann@example.org"),
        ("models:/name@champion", "models:/name@champion"),
        ("delta.`abfss://box@account.dfs.core.windows.net/t`", "delta.`abfss://box@account.dfs.core.windows.net/t`"),
        ("sqlite:////tmp/a@b.db", "sqlite:////tmp/a@b.db"),
    ],
)
def test_passwords_in_uris_are_masked(text, wanted):
    assert masked(text) == wanted
    assert in_one_line(ValueError(text)) == f"ValueError: {wanted}"


def test_the_filter_masks_arguments_and_tracebacks():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(SafeLogFilter())
    logger = logging.getLogger("test_masking")
    logger.addHandler(handler)
    try:
        raise ValueError(f"no answer from http://ann:{SECRET}@host")
    except ValueError:
        logger.exception("requested %s", f"http://ann:{SECRET}@host")
    assert SECRET not in stream.getvalue() and stream.getvalue().count("http://***@host") == 3


@pytest.mark.parametrize(
    "uri", [f"http://ann:{SECRET}@127.0.0.1:9", f"nosuchscheme://ann:{SECRET}@host", f"postgresql://ann:{SECRET}@[bad"]
)
@pytest.mark.parametrize("command", ["serve", "register"])
def test_a_tracking_uri_with_a_password_is_not_printed(capfd, caplog, monkeypatch, golden, uri, command):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    argv = {
        "serve": ["--model-uri", "models:/m/1", "--port", "0"],
        "register": ["--checkpoint", str(golden / "checkpoint_flash"), "--name", "m"],
    }
    import mlflow

    before = mlflow.get_tracking_uri()
    try:
        assert main([command, *argv[command], "--tracking-uri", uri, "--registry-uri", uri]) != 0
    finally:
        mlflow.set_tracking_uri(before)
        mlflow.set_registry_uri(None)  # not what `get_registry_uri` said: that is the tracking URI of the moment
        os.environ.pop("MLFLOW_REGISTRY_URI", None)
    captured = capfd.readouterr()
    assert SECRET not in captured.out + captured.err + caplog.text
    assert captured.err.strip()


FORGED = "id\n2026-01-01 00:00:00,000 ERROR forged\r\x1b[2K\u2028x"


def test_an_error_about_data_is_one_line_of_bounded_length():
    for error in (PayloadError(FORGED), FileError(FORGED), PayloadError("\n" * 10_000_000)):
        assert str(error).isprintable() and len(str(error)) <= 2_000
        assert str(copy.copy(error)) == str(error)
    assert str(PayloadError("x_data holds 2 nulls")) == "x_data holds 2 nulls"


def test_warnings_of_a_row_are_lines_of_bounded_length():
    (warning,) = RowReport(warnings=(FORGED * 1_000,)).warnings
    assert warning.isprintable() and len(warning) == 2_000


def test_a_final_error_message_cannot_forge_a_line():
    assert in_one_line(ValueError(FORGED)) == "ValueError: id"
    assert in_one_line(ConfigError("bad \x1b[2K\tid")) == "bad \\x1b[2K\\tid"


def test_only_the_logger_starts_a_log_line():
    stream = io.StringIO()
    handler, other = logging.StreamHandler(stream), logging.StreamHandler(io.StringIO())
    for each in (other, handler):
        each.addFilter(SafeLogFilter())
        each.setFormatter(logging.Formatter("LOG %(message)s"))
        logging.getLogger("test_forging").addHandler(each)
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("test_forging").exception("row %s", FORGED)
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if not line.startswith("    ")] == ["LOG row id"]
    assert all(line.isprintable() for line in lines) and "Traceback (most recent call last):" in lines[4]


def test_a_library_error_cannot_forge_a_log_line_in_a_worker(capsys, monkeypatch):
    """Spark's workers have no logging of ours: Python's last resort writes to standard error."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with pytest.raises(PreprocessError, match="forged"), row_errors():
        raise ValueError(FORGED)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if not line.startswith("    ")] == ["a row could not be prepared"]


def test_id_cannot_forge_a_log_line():
    assert printable("row\n2026 ERROR forged\x1b[0m\u2028ü") == "row\\n2026 ERROR forged\\x1b[0m\\u2028ü"


@pytest.mark.parametrize(
    ("warning", "kind"),
    [
        ("12 of 1,000 cells carry no gene: what they give is that of <cls>", "N of N cells carry no gene"),
        ("genes asked for are missing: CD3D, B2M", "genes asked for are missing"),
        ("'obs.x' has 3.5 nulls", "… has N nulls"),
        ("CD3D and HLA-A2 are left out (2 columns)", "CD3D and HLA-A2 are left out"),
    ],
)
def test_warning_kind_omits_names_and_numbers(warning, kind):
    assert warning_kind(warning) == kind

"""What tests of single runs share: an output table, and `embed` over the table of the test's module."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def out(tmp_path: Path) -> str:
    """The output table."""
    return f"delta.`{tmp_path}/out`"


@pytest.fixture
def embed(run: Callable, model: str, table: str, out: str) -> Callable:
    """Embed the rows of the module's fixture `table`; give the exit code, the JSON line and standard error."""

    def call(*flags: str, model_uri: str = model) -> tuple[int, dict, str]:
        return run("embed", "--model-uri", model_uri, "--input-table", table, "--output-table", out, *flags)

    return call

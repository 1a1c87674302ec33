"""What the tests of pages share: the system's browser."""

import shutil

import pytest
from playwright.sync_api import sync_playwright


@pytest.fixture(scope="module")
def chromium():
    """The system's Chromium, without its background requests."""
    found = shutil.which("chromium")
    assert found, "chromium is not on the PATH: run `make chromium`"
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()

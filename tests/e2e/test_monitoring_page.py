"""The page of `monitor --report` in headless Chromium, with values that hostile clients chose."""

from datetime import UTC, datetime

import pandas as pd
import pytest

from scgpt_batch.cli.main import ALERTS, main
from scgpt_batch.monitoring import page as pages
from scgpt_batch.settings import MonitorSettings
from tests import inference_tables
from tests.paths import REPO

SCREENSHOTS = REPO / ".cache" / "screenshots"
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><img src=x onerror='window.hacked = 1'>",
    '<a href="http://evil.example">version</a>',
    "'\"&<b>",
]
CHARTS = ["traffic", "daily_performance", "errors", "versions"]


@pytest.fixture(scope="module")
def page_file(spark, tmp_path_factory):
    """The page of an endpoint with many failures and markup in every text that a client chooses."""
    lines = inference_tables.requests(1500, until=datetime.now(UTC), days=6)
    for column in ("requester", "served_entity_id", "response", "databricks_request_id"):
        lines[column] = [f"{text} {i}" if column == "databricks_request_id" else text
                         for i, text in enumerate(HOSTILE * (len(lines) // len(HOSTILE)))]  # fmt: skip
    inference_tables.write(spark, lines, "hostile_payload")
    path = tmp_path_factory.mktemp("page") / "health.html"
    code = main(["monitor", "--inference-table", "hostile_payload", "--report", str(path), "--slow-ms", "100"])
    assert code == ALERTS
    return path


@pytest.fixture(params=["light", "dark"])
def opened(chromium, page_file, request):
    """The page in a browser tab, with its console messages and network requests."""
    tab = chromium.new_page(color_scheme=request.param, viewport={"width": 1200, "height": 900})
    console, requests = [], []
    tab.on("console", lambda message: console.append(message.text))
    tab.on("pageerror", lambda error: console.append(str(error)))
    tab.on("request", lambda call: requests.append(call.url))
    tab.goto(page_file.as_uri())
    yield tab, console, requests, request.param
    tab.close()


def luminance(colour):
    """Relative luminance of `rgb(r, g, b)`, by WCAG 2."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(front, back):
    lighter, darker = sorted((luminance(front), luminance(back)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_charts_and_alerts_show_without_network(opened, page_file):
    tab, console, requests, scheme = opened
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SCREENSHOTS / f"monitor-{scheme}.png", full_page=True)
    assert (SCREENSHOTS / f"monitor-{scheme}.png").stat().st_size > 20_000
    for name in CHARTS:
        marks = ".fill" if name in pages.CATEGORIES else ".plot path.line"
        assert tab.locator(f"#chart-{name} {marks}").first.bounding_box()["width"] > 50, name
    assert tab.locator(".alert.critical", has_text="error_rate").is_visible()
    assert tab.locator(".alert.warning", has_text="versions").is_visible()
    assert console == [] and requests == [page_file.as_uri()]
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("a[href^=http], img").count() == 0
    assert tab.locator("td", has_text=HOSTILE[0]).count() > 0


def test_text_has_contrast_in_light_and_dark(opened):
    tab, _, _, scheme = opened
    colours = """selector => [getComputedStyle(document.querySelector(selector)).color,
                              getComputedStyle(document.body).backgroundColor]"""
    assert (luminance(tab.evaluate(colours, "body")[1]) > 0.5) == (scheme == "light")
    for selector in ("body", ".soft", ".alert.critical", ".alert.warning", "nav a", ".xs span", ".card strong"):
        assert contrast(*tab.evaluate(colours, selector)) >= 4.5, selector


def focused(tab):
    return tab.evaluate("[document.activeElement.tagName, document.activeElement.textContent.trim().slice(0, 60)]")


def test_page_works_by_keyboard(opened):
    tab, *_ = opened
    tab.keyboard.press("Tab")
    assert focused(tab) == ["A", "Skip to the alerts"]
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"
    visited = []
    while (tab.keyboard.press("Tab"), focused(tab))[1][0] != "BODY" and len(visited) < 60:
        visited.append(focused(tab))
        if visited[-1][0] == "SUMMARY":
            tab.keyboard.press("Enter")  # opens the chart's table, which is next
    assert [text for tag, text in visited if tag == "SUMMARY"] == [
        f"{pages.SECTIONS[name][0]} as a table" for name in CHARTS
    ]
    assert sum(tag == "DIV" for tag, _ in visited) == tab.locator("table").count() == 8


def test_page_has_names_for_screen_readers(opened):
    tab, *_ = opened
    tree = tab.locator("body").aria_snapshot()
    assert 'heading "scgpt_batch health: critical" [level=1]' in tree
    assert 'heading "Alerts" [level=2]' in tree and 'navigation "Sections"' in tree
    assert tree.count('img "Chart:') + tree.count('list "Chart:') == len(CHARTS)
    assert tree.count("Critical.") == len(tab.locator(".card.critical").all()) > 0
    assert tab.evaluate("document.documentElement.lang") == "en" and "critical" in tab.title()
    assert tab.locator("th:not([scope])").count() == 0 and tab.locator("table:not(:has(caption))").count() == 0


def test_page_without_alerts_and_rows():
    answers = {"endpoint_health": pd.DataFrame([{"requests": 0.0, "error_rate": None, "p95_ms": None, "versions": []}],
                                               dtype=object),
               "errors": pd.DataFrame(columns=["status_code", "errors"])}  # fmt: skip
    text = pages.render(MonitorSettings(inference_table="t"), answers, [], [], datetime.now(UTC))
    assert "No alerts" in text and "No rows." in text and "chart-errors" not in text


def test_button_changes_the_theme(opened):
    tab, *_, scheme = opened
    back = "getComputedStyle(document.body).backgroundColor"
    before = luminance(tab.evaluate(back))
    tab.get_by_role("button", name="Light theme" if scheme == "dark" else "Dark theme").click()
    assert (luminance(tab.evaluate(back)) > 0.5) != (before > 0.5)


def test_page_fits_on_a_phone(opened):
    tab, *_ = opened
    tab.set_viewport_size({"width": 390, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") == 390

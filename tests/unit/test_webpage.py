"""The look that the pages share: ticks, charts, escaping, and a policy that lets no foreign script run."""

import base64
import hashlib
import json
import re
from datetime import UTC, date, datetime, timedelta

import pandas as pd
import pytest

from scgpt_batch.errors import ConfigError
from scgpt_batch.monitoring import page as monitoring_page
from scgpt_batch.monitoring.rules import RULES, Alert, Outcome
from scgpt_batch.settings import MonitorSettings
from scgpt_batch.webpage import page
from scgpt_batch.webpage.charts import bar_chart, line_chart, nice_ticks, time_ticks

NOON = datetime(2026, 11, 20, 12, 30, tzinfo=UTC)
SETTINGS = MonitorSettings(inference_table="t")
RULE = {rule.name: rule for rule in RULES}


@pytest.mark.parametrize(
    ("highest", "ticks"),
    [(0, [0, 1]), (1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (8, [0, 2, 4, 6, 8]), (47, [0, 10, 20, 30, 40, 50]),
     (1080, [0, 250, 500, 750, 1000, 1250])],
)  # fmt: skip
def test_value_axis_has_round_numbers(highest, ticks):
    assert nice_ticks(highest) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("hours", "texts"),
    [(5, ["08:00", "09:00", "10:00", "11:00", "12:00"]), (24, ["15:00", "18:00", "21:00", "Nov 20", "03:00", "06:00",
     "09:00", "12:00"]), (72, ["Nov 18", "12:00", "Nov 19", "12:00", "Nov 20", "12:00"])],
)  # fmt: skip
def test_time_axis_has_round_times(hours, texts):
    assert [tick["text"] for tick in time_ticks(NOON - timedelta(hours=hours), NOON)] == texts


def test_lines_start_again_after_a_missing_value():
    times = [NOON + timedelta(hours=i) for i in range(4)]
    (line,) = line_chart("label", times, {"p50_ms": [1.0, None, 2.0, 4.0]})["series"]
    assert line["name"] == "p50 ms"
    assert line["path"] == "M0.0 750.0M666.7 500.0L1000.0 0.0"
    assert [(dot["text"][-1], dot["is_alone"]) for dot in line["dots"]] == [("1", True), ("2", False), ("4", False)]


def test_a_path_breaks_between_its_words():
    assert page.breakable("Table <b>/data/cell_embeddings") == "Table &lt;b&gt;/<wbr>data/<wbr>cell_<wbr>embeddings"


def test_bars_are_shares_of_the_longest():
    bars = bar_chart("label", ["a", "b"], [30.0, 3.0])["bars"]
    assert [(bar["width"], bar["text"]) for bar in bars] == [(100.0, "30"), (10.0, "3")]


def test_data_block_cannot_end_its_element():
    hostile = "</script><!--<script>&\u2028"
    block = page.data_block({"names": [hostile]})
    assert not set(block) & set("<>&\u2028")
    assert json.loads(block) == {"names": [hostile]}


def health_page(results=(), outcomes=()):
    return monitoring_page.render(SETTINGS, dict(results), list(outcomes), [], NOON)


def test_policy_allows_the_scripts_of_the_page_alone():
    text = health_page()
    allowed = re.findall(r"'sha256-([^']+)'", text)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert scripts and allowed == [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert "script-src 'unsafe-inline'" not in text


def test_page_cannot_replace_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="it is a folder"):
        page.check(str(tmp_path))


def test_monitoring_page_is_small():
    assert len(health_page()) < 20_000


def test_one_point_is_shown_as_a_number():
    latency = pd.DataFrame([[date(2026, 11, 20), 12.0, 81.5, 90.0]], columns=["day", "p50_ms", "p95_ms", "p99_ms"])
    text = health_page({"daily_performance": latency.astype(object)})
    assert "One day: 2026-11-20" in text and "<dd>81.5</dd>" in text
    assert "23:59" not in text and "<svg" not in text


def test_traffic_says_which_hours_are_not_complete():
    hours = pd.DataFrame([[NOON, 8.0, 0.0, None]], columns=["hour", "requests", "errors", "usual"], dtype=object)
    assert "The hours from 11:00 on are not complete" in health_page({"traffic": hours})


@pytest.mark.parametrize(
    ("outcome", "value", "verdict", "note"),
    [
        (Outcome(RULE["error_rate"], value=0.021, is_checked=True), "2.1 %", "OK.", "Alert above 5 %."),
        (Outcome(RULE["p95"], note="no durations"), "–", "", "No durations. Alert above 10,000 ms."),
        (Outcome(RULE["run_failed"], value="finished", is_checked=True), "finished", "OK.", "Alert unless finished."),
        (Outcome(RULE["no_requests"], (Alert("no_requests", "info", ""),), 0, True), "0", "Note.", "Alert at 0."),
        (Outcome(RULE["p95"], (Alert("p95", "critical", ""),), 2e4, True), "20,000 ms", "Critical.",
         "Alert above 10,000 ms."),
    ],
)  # fmt: skip
def test_every_rule_has_a_card_with_value_and_threshold(outcome, value, verdict, note):
    card = monitoring_page.card(outcome, SETTINGS)
    found = (card[name].replace("\N{NO-BREAK SPACE}", " ") for name in ("value", "verdict", "note"))
    assert tuple(found) == (value, verdict, note)


def test_a_line_does_not_break_between_a_number_and_its_unit():
    assert monitoring_page.with_unit(0.25, "%") == "25\N{NO-BREAK SPACE}%"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_says_what_it_measures(rule):
    assert rule.measures
    assert rule.missing or rule.absent.format_map(SETTINGS.model_dump()) or rule.queries == ("endpoint_health",)

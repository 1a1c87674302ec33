"""The commands `monitor` and `maintain`: health rules, exit codes, webhook, retention."""

import json
import threading
from datetime import UTC, datetime, timedelta
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import get_args

import pytest

from scgpt_batch.cli.main import ALERTS, OK, WRONG_USAGE, main
from scgpt_batch.monitoring import rules as health_rules
from scgpt_batch.monitoring.monitor import HealthCheck, check
from scgpt_batch.settings import MonitorSettings, RuleName
from scgpt_batch.spark import tables
from tests import inference_tables

NOW = datetime(2026, 11, 20, 12, 30, tzinfo=UTC)


@pytest.fixture(scope="module")
def healthy(spark):
    """A table of a healthy endpoint: some thirty requests an hour, all answered fast, by one version."""
    lines = inference_tables.requests(6000, until=NOW, days=8)
    lines["status_code"], lines["served_entity_id"], lines["execution_duration_ms"] = 200, "scgpt-3", 100
    return inference_tables.write(spark, lines, "healthy_payload")


@pytest.fixture(scope="module")
def judged(spark, healthy):
    """Check the healthy table after a change to its columns or rows; return the rules that fired.

    The table is queried once for a change, as the thresholds, severities and rules to ignore are no part of the SQL.
    """

    @cache
    def query(change, where, delay):
        name, _, value = change.partition(" = ")
        rows = spark.table(healthy).where(where)
        if name != "1":
            rows = rows.selectExpr(*(f"{value} as {c}" if c == name else c for c in rows.columns))
        rows.createOrReplaceTempView("changed_payload")
        health = HealthCheck(spark, MonitorSettings(inference_table="changed_payload", **dict(delay)), NOW)
        check(health)
        return health.results

    def judge(change="1 = 1", *, where="true", **settings):
        delay = frozenset((name, value) for name, value in settings.items() if name == "delay_minutes")
        results = query(change, where, delay)
        return {alert.rule: alert.severity for alert in health_rules.check(results, MonitorSettings(**settings), NOW)}

    return judge


LAST_HOUR = "request_time >= '2026-11-20 10:00:00' and request_time < '2026-11-20 11:00:00'"
ONE_IN = "pmod(xxhash64(databricks_request_id), {}) = 0"


def canary(when):
    """A second version gets a ninth of the requests."""
    return f"served_entity_id = if({when} and {ONE_IN.format(9)}, 'scgpt-2', 'scgpt-3')"


@pytest.mark.parametrize(
    ("fault", "rules"),
    [
        ({}, {}),
        ({"change": f"status_code = if({ONE_IN.format(12)}, 500, 200)"}, {"error_rate": "critical"}),
        ({"change": f"status_code = if({ONE_IN.format(40)}, 500, 200)"}, {}),
        ({"change": f"status_code = if({ONE_IN.format(40)}, 503, 200)", "max_error_rate": 0.01},
         {"error_rate": "critical"}),
        ({"change": f"status_code = if({ONE_IN.format(40)}, 503, 200)", "max_error_rate": 0.01, "min_errors": 500}, {}),
        ({"change": f"status_code = if({ONE_IN.format(3)}, 400, 200)"}, {"client_error_rate": "warning"}),
        ({"change": f"status_code = if({ONE_IN.format(12)}, 400, 200)"}, {}),
        ({"change": "status_code = cast(null as int)"}, {"error_rate": "critical"}),
        ({"change": f"execution_duration_ms = if({ONE_IN.format(12)}, 10001L, 5L)"}, {"p95": "warning"}),
        ({"change": f"execution_duration_ms = if({ONE_IN.format(40)}, 10001L, 5L)"}, {}),
        ({"change": "execution_duration_ms = cast(null as bigint)"}, {}),
        ({"change": f"served_entity_id = if({ONE_IN.format(9)}, 'scgpt-2', 'scgpt-3')"}, {"versions": "warning"}),
        ({"change": "served_entity_id = if(request_time < '2026-11-19 15:00:00', 'scgpt-2', 'scgpt-3')"}, {}),
        ({"change": canary("request_time > '2026-11-17 15:00:00'"), "max_canary_days": 4}, {}),
        ({"change": canary("request_time > '2026-11-17 15:00:00'")}, {"versions": "warning"}),
        ({"change": canary("request_time < '2026-11-19 00:00:00'")}, {}),
        ({"where": f"not ({LAST_HOUR}) or {ONE_IN.format(4)}"}, {"volume": "warning"}),
        ({"where": f"not ({LAST_HOUR}) or not {ONE_IN.format(5)}"}, {}),
        ({"where": f"not ({LAST_HOUR})"}, {"volume": "warning"}),
        ({"where": f"not ({LAST_HOUR})", "ignore": ["volume"]}, {}),
        ({"where": f"not ({LAST_HOUR})", "severity": {"volume": "critical"}}, {"volume": "critical"}),
        ({"where": f"not ({LAST_HOUR})", "min_usual_requests": 1000}, {}),
        # an hour whose rows may still arrive is not compared
        ({"where": "request_time < '2026-11-20 11:00:00'"}, {}),
        ({"where": "request_time < '2026-11-20 11:00:00'", "delay_minutes": 0}, {"volume": "warning"}),
        # an endpoint with regular requests that has none is more than idle
        ({"where": "request_time < '2026-11-19 12:00:00'"}, {"no_requests": "info", "volume": "warning"}),
        ({"where": "request_time < '2026-11-19 12:00:00'", "severity": {"no_requests": "critical"}},
         {"no_requests": "critical"}),
        ({"where": "false"}, {"no_requests": "info"}),
    ],
    ids=["healthy", "errors", "few errors", "threshold", "too few errors", "client errors", "few client errors",
         "no status", "slow", "few slow", "no durations", "two versions",
         "a swap", "an allowed canary", "a long canary", "an ended canary", "a quarter",
         "four fifths", "an empty hour", "ignored", "more severe", "little traffic", "late rows", "no late rows",
         "silent", "silent and critical", "idle"],
)  # fmt: skip
def test_each_endpoint_rule_fires_and_does_not(judged, fault, rules):
    assert judged(**fault) == rules


@pytest.mark.parametrize(
    ("requests", "client_errors", "server_errors", "rules"),
    [
        (8, 2, 0, []),
        (8, 0, 2, []),
        (8, 0, 4, []),
        (8, 0, 5, ["error_rate"]),
        (8, 5, 0, ["client_error_rate"]),
        (100, 30, 6, ["error_rate", "client_error_rate"]),
        (100, 25, 5, []),
    ],
)
def test_error_rules_need_a_minimum_of_their_kind(spark, requests, client_errors, server_errors, rules):
    health = spark.createDataFrame(
        [(float(requests), float(client_errors), float(server_errors), 1.0, ["1"])],
        "requests double, client_errors double, server_errors double, p95_ms double, versions array<string>",
    )
    assert [alert.rule for alert in health_rules.check({"endpoint_health": health}, MonitorSettings(), NOW)] == rules


def run(hours_ago, status="finished", ok=9, failed=1, mode="static"):
    """A run that took an hour."""
    ended = NOW - timedelta(hours=hours_ago)
    return ("r", mode, status, ended - timedelta(hours=1), None if status == "running" else ended, ok, failed)


RUNS = """run_id string, mode string, status string, started_at timestamp, finished_at timestamp, rows_ok bigint,
          rows_failed bigint"""


def vectors(sampled, distinct, cosine):
    return ("r", sampled, distinct, cosine)


VECTORS = "run_id string, sampled bigint, distinct_vectors bigint, mean_cosine double"


@pytest.mark.parametrize(
    ("runs", "collapse", "rules"),
    [
        ([run(25)], [vectors(1000, 990, 0.8)], []),
        ([], [], ["run_late"]),
        ([run(27)], [], ["run_late"]),
        ([run(1, "failed"), run(25)], [], ["run_failed"]),
        ([run(1), run(2, "failed")], [], []),
        ([run(1, mode="cell"), run(2, "failed")], [], ["run_failed"]),  # tasks of one night in two modes
        ([run(1, "failed"), run(30)], [], ["run_late", "run_failed"]),
        ([run(0, "running"), run(20)], [], []),
        ([run(0, "running"), run(1, "failed"), run(20)], [], ["run_failed"]),
        ([run(27, "running"), run(30)], [], ["run_late", "run_failed"]),  # a killed run
        ([run(1, ok=8, failed=2)], [], ["rows_failed"]),
        ([run(1, ok=8, failed=2), run(2, mode="cell"), run(3)], [], ["rows_failed"]),
        ([run(1, ok=0, failed=0), run(2, ok=0, failed=3)], [], ["rows_failed"]),  # the retry had no rows to embed
        ([run(1, ok=3, failed=0), run(2, ok=0, failed=3)], [], []),
        ([run(1, mode="cell"), run(30, ok=0, failed=3)], [], []),
        ([run(1)], [vectors(1000, 1, 1.0)], ["collapse"]),
        ([run(1)], [vectors(1000, 1000, 0.9999)], ["collapse"]),
        ([run(1)], [vectors(1000, 1000, 0.99)], []),
        ([run(1)], [vectors(1, 1, None)], []),
    ],
)
def test_each_batch_rule_fires_and_does_not(spark, runs, collapse, rules):
    results = {
        "last_runs": spark.createDataFrame(runs, RUNS),
        "collapse_cells": spark.createDataFrame(collapse, VECTORS),
    }
    assert [alert.rule for alert in health_rules.check(results, MonitorSettings(), NOW)] == rules


@pytest.fixture(scope="module")
def of_now(spark):
    """Tables with recent requests: all well, answered by two versions, and all failed."""
    lines = inference_tables.requests(300, until=datetime.now(UTC), days=6)
    lines["status_code"], lines["execution_duration_ms"], lines["served_entity_id"] = 200, 100, "scgpt-3"
    inference_tables.write(spark, lines, "payload_of_now")
    lines.loc[lines.index[::3], "served_entity_id"] = "scgpt-2"
    inference_tables.write(spark, lines, "payload_of_two")
    inference_tables.write(spark, lines[:0], "idle_payload")
    lines["status_code"] = 500
    return inference_tables.write(spark, lines, "payload_of_errors")


@pytest.fixture
def call(capfd):
    """Run a command; return its exit code, its JSON line and standard error."""

    def run(*argv):
        capfd.readouterr()
        code = main([str(arg) for arg in argv])
        summary = capfd.readouterr()
        return code, json.loads(summary.out.strip().splitlines()[-1]) if summary.out.strip() else {}, summary.err

    return run


@pytest.fixture
def webhook():
    """A local HTTP server: its URL, the posts it received, and the status it responds with."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            came.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(state["status"])
            self.end_headers()

        def log_message(self, *args):
            pass

    came, state = [], {"status": 200}
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/secret-path", came, state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("table", "fail_on", "code", "status"),
    [
        ("payload_of_now", "warning", OK, "ok"),
        ("payload_of_two", "critical", OK, "warning"),
        ("payload_of_two", "warning", ALERTS, "warning"),
        ("payload_of_errors", "critical", ALERTS, "critical"),
        ("payload_of_errors", "warning", ALERTS, "critical"),
        ("idle_payload", "warning", OK, "ok"),
    ],
)
def test_exit_code_depends_on_fail_on(call, of_now, webhook, monkeypatch, table, fail_on, code, status):
    url, came, _ = webhook
    monkeypatch.setenv("SCGPT_BATCH_WEBHOOK_URL", url)
    found, summary, _ = call("monitor", "--inference-table", table, "--fail-on", fail_on)
    assert (found, summary["status"]) == (code, status)
    assert {alert["severity"] for alert in summary["alerts"]} <= {"info", "warning", "critical"}
    assert (summary["requests"] > 0) == (table != "idle_payload")
    assert len(came) == (status != "ok")  # nothing is posted if all is well


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], "--inference-table"),
        (["--inference-table", "not_there"], "not_there"),
        (["--inference-table", "healthy_payload", "--report", "/nowhere/page.html"], "/nowhere"),
        (["--runs-table", "not_there"], "not_there"),
        (["--inference-table", "healthy_payload", "--days", "1"], "days"),
        (["--inference-table", "healthy_payload", "--ignore", "versoins"], "ignore"),
        (["--inference-table", "healthy_payload", "--severity", "p95=fatal"], "severity"),
    ],
)
def test_wrong_usage_of_monitor_is_one_line(call, healthy, argv, wanted):
    code, _, err = call("monitor", *argv)
    assert code == WRONG_USAGE and wanted in err.strip().splitlines()[-1]


def test_alerts_are_posted_in_slack_format(call, of_now, webhook, monkeypatch):
    url, came, _ = webhook
    monkeypatch.setenv("SCGPT_BATCH_WEBHOOK_URL", url)
    _, summary, _ = call("monitor", "--inference-table", "payload_of_two")
    assert [alert["rule"] for alert in summary["alerts"]] == ["versions"]
    assert list(came[0]) == ["text"] and summary["alerts"][0]["message"] in came[0]["text"]


def test_every_rule_has_its_name_in_the_settings():
    assert tuple(rule.name for rule in health_rules.RULES) == get_args(RuleName)


@pytest.mark.parametrize("fault", ["status", "address"])
def test_failed_post_is_an_alert_without_the_url(call, of_now, webhook, monkeypatch, fault):
    url, _, state = webhook
    state["status"] = 500
    monkeypatch.setenv("SCGPT_BATCH_WEBHOOK_URL", url if fault == "status" else "http://127.0.0.1:9/secret-path")
    code, summary, err = call("monitor", "--inference-table", "payload_of_two")
    assert code == ALERTS and [alert["rule"] for alert in summary["alerts"]] == ["versions", "webhook"]
    assert "secret-path" not in json.dumps(summary) + err


# Housekeeping


def files(folder):
    return len(list(folder.rglob("*.parquet")))


def test_maintain_deletes_old_rows_and_their_files(spark, call, tmp_path):
    folder, today = tmp_path / "payload", datetime.now(UTC)
    table = f"delta.`{folder}`"
    lines = inference_tables.requests(400, until=today, days=200)
    lines.loc[:2, "request_date"] = [today.date() - timedelta(days=n) for n in (89, 90, 91)]
    inference_tables.write(spark, lines, table)
    kept = [day for day in lines["request_date"] if day >= today.date() - timedelta(days=90)]
    code, summary, _ = call("maintain", "--table", table, "--date-column", "request_date", "--retain-days", 90,
                         "--vacuum-hours", 0, "--force")  # fmt: skip
    assert code == OK and summary["rows_deleted"] == 400 - len(kept) and summary["files_vacuumed"] > 0
    assert sorted(row[0] for row in spark.table(table).select("request_date").collect()) == sorted(kept)
    old = "request_date < date_sub(current_date(), 90)"
    left = spark.read.parquet(*(str(file) for file in folder.glob("*.parquet")))
    assert left.where(old).count() == 0  # deletion vectors alone would keep them


def test_maintain_compacts_and_deletes_no_rows(spark, call, tmp_path):
    table = f"delta.`{tmp_path}/small`"
    spark.range(40, numPartitions=8).selectExpr("id", "current_date() as day").write.format("delta").save(
        str(tmp_path / "small")
    )
    code, summary, _ = call("maintain", "--table", table)
    assert code == OK and (summary["rows_deleted"], summary["files_compacted"], summary["files_written"]) == (0, 8, 1)
    assert summary["files_vacuumed"] == 0 and files(tmp_path) == 9  # the last week's versions can still be read
    code, summary, _ = call("maintain", "--table", table, "--vacuum-hours", 0, "--force")
    assert (summary["files_vacuumed"], files(tmp_path)) == (8, 1)
    assert spark.table(table).count() == 40
    assert spark.conf.get("spark.databricks.delta.retentionDurationCheck.enabled", "true") == "true"


def test_maintain_deletes_records_of_old_finished_runs(spark, call, tmp_path):
    table, runs = f"delta.`{tmp_path}/e`", f"delta.`{tmp_path}/e_runs`"
    tables.create(spark, table, tables.CELL_EMBEDDINGS)
    tables.insert(spark, table, {"adata_id": "a", "run_id": "in use"})  # embed finds by its run what to remove later
    tables.create(spark, runs, tables.RUNS)
    today = datetime.now(UTC)
    for name, days, status in (
        ("new", 364, "finished"), ("old", 367, "finished"), ("in use", 500, "finished"), ("killed", 400, "running"),
    ):  # fmt: skip
        at = today - timedelta(days=days)
        line = {"run_id": name, "status": status, "started_at": at, "finished_at": at, "output_table": table}
        tables.insert(spark, runs, line)
    code, summary, _ = call("maintain", "--table", table, "--runs-days", 365)
    assert (code, summary["rows_deleted"]) == (OK, 1)
    assert {row["run_id"] for row in spark.table(runs).collect()} == {"new", "in use", "killed"}


@pytest.mark.parametrize(("shown", "on"), [("ENABLE (inherited from METASTORE m)", True), ("DISABLE", False)])
def test_predictive_optimization_is_read_from_the_description(shown, on):
    """As a Unity Catalog table describes itself: open-source Spark has no such line."""
    session = SimpleNamespace(sql=lambda sql: SimpleNamespace(collect=lambda: [
        {"col_name": "id", "data_type": "bigint"}, {"col_name": "", "data_type": None},
        {"col_name": "Predictive Optimization", "data_type": shown},
    ]))  # fmt: skip
    assert tables.is_vacuumed_by_databricks(session, "main.lab.t") is on


def test_maintain_leaves_vacuum_to_predictive_optimization(spark, call, tmp_path, monkeypatch):
    spark.range(40, numPartitions=4).write.format("delta").save(str(tmp_path / "t"))
    table = f"delta.`{tmp_path}/t`"
    monkeypatch.setattr(tables, "is_vacuumed_by_databricks", lambda *_: True)
    code, summary, _ = call("maintain", "--table", table)
    operations = {row["operation"] for row in spark.sql(f"describe history {table}").collect()}
    assert (code, summary["files_compacted"]) == (OK, 4) and "VACUUM START" not in operations


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--vacuum-hours", 100], "--force"),
        (["--runs-days", 30], "has no table of runs"),
        (["--retain-days", 30], "--date-column"),
        (["--date-column", "nothing"], "nothing"),
        (["--date-column", "requester"], "requester"),
        (["--table", "not_there"], "not_there"),
    ],
)
def test_wrong_usage_of_maintain_changes_nothing(spark, call, healthy, argv, wanted):
    before = spark.sql(f"describe history {healthy}").count()
    code, _, err = call("maintain", "--table", healthy, *argv)
    assert code == WRONG_USAGE and wanted in err.strip().splitlines()[-1]
    assert spark.sql(f"describe history {healthy}").count() == before

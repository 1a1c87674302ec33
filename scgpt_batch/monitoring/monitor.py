"""The command `scgpt-batch monitor`: ask the questions, judge the answers, write the page, post the alerts."""

import logging
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pandas as pd
import requests
from pyspark.sql import SparkSession

from scgpt_batch.errors import ConfigError
from scgpt_batch.monitoring import page
from scgpt_batch.monitoring import rules as health
from scgpt_batch.monitoring.queries import ask, readable, requests_view
from scgpt_batch.monitoring.rules import Alert
from scgpt_batch.settings import MonitorSettings, Summary
from scgpt_batch.spark import tables

logger = logging.getLogger(__name__)

# The address is a secret (whoever has it can post), so it is no setting: flags are seen by everyone on the machine.
WEBHOOK = "SCGPT_BATCH_WEBHOOK_URL"
WEBHOOK_TIMEOUT = 10  # seconds

HEALTH = ("requests", "error_rate", "client_errors", "server_errors", "p95_ms", "versions")  # of the summary
SHOWN = 20  # requests or runs in a table of the page
SAMPLE = 1_000  # vectors of a run that the collapse canary compares: half a million numbers at d 512


@dataclass
class Findings:
    """What was asked, and what came out of it."""

    spark: SparkSession
    settings: MonitorSettings
    now: datetime
    answers: dict[str, pd.DataFrame] = field(default_factory=dict)
    alerts: list[Alert] = field(default_factory=list)

    @property
    def window(self) -> datetime:
        """Since when requests are judged."""
        return self.now - timedelta(hours=self.settings.hours)

    @property
    def history(self) -> datetime:
        """Since when is compared and shown."""
        return self.now - timedelta(days=self.settings.days)

    def ask(self, name: str, **parameters: Any) -> list[dict[str, Any]]:
        """Ask a question, keep the answer for the page, return its rows."""
        logger.info("asking %s", name)
        rows = ask(self.spark, name, **parameters)
        found = [{key: _utc(value) for key, value in row.asDict().items()} for row in rows.collect()]
        self.answers[name] = pd.DataFrame(found, columns=rows.columns, dtype=object)
        return found


def monitor(spark: SparkSession, settings: MonitorSettings, *, now: datetime | None = None) -> Summary:
    """Ask, judge, report; `now` is the time to judge at.

    Raises
    ------
    ConfigError
        No table was named, one is not there, or the page cannot be made; nothing was posted.
    """
    if not (settings.inference_table or settings.output_table or settings.runs_table):
        raise ConfigError("monitor needs --inference-table, --output-table or --runs-table")
    page.check(settings.report)
    findings = Findings(spark, settings, now or datetime.now(UTC))
    told = judge(findings)
    if findings.alerts and (url := os.environ.get(WEBHOOK)):
        findings.alerts += _post(url, settings, findings.alerts)
    for alert in findings.alerts:
        logger.warning("%s %s: %s", alert.severity, alert.rule, alert.message)
    if settings.report:
        page.write(settings, findings.answers, findings.alerts, findings.now)
        told["report"] = settings.report
    return told | _verdict(findings)


def judge(findings: Findings) -> Summary:
    """Ask the tables that the settings name and judge the answers: status, alerts and the figures judged."""
    told: Summary = {}
    if findings.settings.inference_table:
        told |= _endpoint(findings)
    if findings.settings.output_table or findings.settings.runs_table:
        told |= _batch(findings)
    return _verdict(findings) | told


def _verdict(findings: Findings) -> Summary:
    return {"status": health.status(findings.alerts), "alerts": [asdict(alert) for alert in findings.alerts]}


def _endpoint(findings: Findings) -> Summary:
    settings = findings.settings
    view = requests_view(findings.spark, settings.inference_table, settings.requests_view)
    (window,) = findings.ask("endpoint_health", requests=view, since=findings.window)
    # rows come late: an hour counts when the table can hold all of it
    arrived = findings.now - timedelta(minutes=settings.delay_minutes)
    traffic = findings.ask("traffic", requests=view, since=findings.history, until=arrived)
    findings.alerts += health.endpoint_alerts(window, traffic[-1], settings)
    if settings.report:
        shown = {"requests": view, "since": findings.history}
        for name in ("daily_performance", "errors", "versions", "requesters", "payloads"):
            findings.ask(name, **shown)
        findings.ask("slow_requests", **shown, slow_ms=settings.slow_ms, limit=SHOWN)
        findings.ask("recent_requests", **shown, limit=SHOWN)
    return {name: window[name] for name in HEALTH}


def _batch(findings: Findings) -> Summary:
    settings, spark = findings.settings, findings.spark
    runs_table = settings.runs_table or tables.beside(tables.table_name(settings.output_table), "_runs")
    runs_view = readable(spark, runs_table, "scgpt_runs")
    runs = findings.ask("last_runs", runs=runs_view, limit=SHOWN)
    output = settings.output_table or (runs[0]["output_table"] if runs else "")
    collapse = []
    if output:
        embeddings = readable(spark, output, "scgpt_embeddings")
        name = "collapse_cells" if "cell_id" in spark.table(embeddings).columns else "collapse_genes"
        collapse = findings.ask(name, embeddings=embeddings, since=findings.history, sample=SAMPLE)
    findings.alerts += health.batch_alerts(runs, collapse, settings, findings.now)
    if settings.report and runs:
        _batch_details(findings, runs_view, output, runs[0]["input_table"])
    return {"last_run": runs[0]["run_id"] if runs else None, "last_run_status": runs[0]["status"] if runs else None}


def _batch_details(findings: Findings, runs_view: str, output: str, rows_table: str) -> None:
    spark, since = findings.spark, findings.history
    findings.ask("cells_per_second", runs=runs_view, since=since)
    ledger_table = findings.settings.ledger_table or tables.beside(tables.table_name(output), "_ledger")
    ledger = readable(spark, ledger_table, "scgpt_ledger")
    findings.ask("failed_rows", ledger=ledger, since=since)
    if tables.exists(spark, rows_table):
        findings.ask("coverage", ledger=ledger, rows=readable(spark, rows_table, "scgpt_rows"), since=since)
    else:
        logger.warning("%s is gone: the page has no coverage by sample", rows_table)


def _utc(value: Any) -> Any:
    """Give a time its zone: Spark collects times naive, in this machine's zone."""
    return value.astimezone(UTC) if isinstance(value, datetime) else value


def _post(url: str, settings: MonitorSettings, alerts: list[Alert]) -> list[Alert]:
    """Post the alerts as Slack takes them; an alert that cannot be posted is itself an alert."""
    what = settings.inference_table or settings.output_table or settings.runs_table
    lines = [f"scgpt-batch: {what} is {health.status(alerts)}"]
    lines += [f"• {alert.severity} {alert.rule}: {alert.message}" for alert in alerts]
    text = "\n".join(lines).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    try:
        answer = requests.post(url, json={"text": text}, timeout=WEBHOOK_TIMEOUT)
        fault = "" if answer.ok else f"HTTP {answer.status_code}"
    except requests.RequestException as exc:
        fault = type(exc).__name__  # its message would tell the address
    return [Alert("webhook", "critical", f"the alerts could not be posted to ${WEBHOOK}: {fault}")] if fault else []

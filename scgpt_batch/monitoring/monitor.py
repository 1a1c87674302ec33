"""The command `scgpt-batch monitor`: run the SQL queries, check the rules, write the page, post the alerts."""

import logging
import os
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pandas as pd
import requests
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from scgpt_batch.command_result import ALERTS, OK, CommandResult
from scgpt_batch.errors import ConfigError
from scgpt_batch.monitoring import page, queries, rules
from scgpt_batch.monitoring.queries import readable, requests_view
from scgpt_batch.monitoring.rules import Alert, Outcome
from scgpt_batch.settings import MonitorSettings
from scgpt_batch.spark import tables
from scgpt_batch.spark.local_frame import local_frame
from scgpt_batch.webpage import page as webpage

logger = logging.getLogger(__name__)

# The URL is a secret (whoever has it can post), so it is not a setting: everyone on the machine can read flags.
WEBHOOK = "SCGPT_BATCH_WEBHOOK_URL"
WEBHOOK_TIMEOUT = 10  # seconds

TABLE_ROWS = 20  # requests or runs in a table of the page
SAMPLE = 1_000  # vectors of a run that the collapse check compares: half a million numbers at d 512


@dataclass(frozen=True)
class EndpointFigures:
    """What was measured of an endpoint's requests."""

    requests: int
    error_rate: float | None
    client_errors: int
    server_errors: int
    p95_ms: float | None
    versions: list[str]


@dataclass(frozen=True)
class LastRun:
    """The newest run of the batch job; None where there is none."""

    last_run: str | None
    last_run_status: str | None


@dataclass(frozen=True, kw_only=True)
class MonitorResult(CommandResult):
    """The rules that fired, and the figures they were applied to."""

    status: str
    alerts: list[Alert]
    endpoint: EndpointFigures | None = None  # None: no inference table was named
    batch: LastRun | None = None  # None: no table of the batch job was named
    report: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the values of the JSON line: the figures beside status and alerts."""
        values = super().to_dict()
        endpoint, batch, report = (values.pop(name) for name in ("endpoint", "batch", "report"))
        return values | (endpoint or {}) | (batch or {}) | ({"report": report} if report else {})

    def lines(self) -> list[str]:
        """Say the status, the alerts and where the report is."""
        lines = [f"status: {self.status}"]
        lines += [f"{alert.severity} {alert.rule}: {alert.message}" for alert in self.alerts] or ["no alerts"]
        if self.endpoint:
            p95 = "" if self.endpoint.p95_ms is None else f", 95th percentile {self.endpoint.p95_ms:,.0f} ms"
            errors = f"{self.endpoint.server_errors:,} server errors, {self.endpoint.client_errors:,} client errors"
            lines.append(f"endpoint: {self.endpoint.requests:,} requests, {errors}{p95}")
        if self.batch:
            lines.append(f"last run: {self.batch.last_run or 'none'} ({self.batch.last_run_status or 'no status'})")
        return lines + ([f"report: {self.report}"] if self.report else [])


@dataclass
class HealthCheck:
    """One check: the queries that ran, their results, and the alerts."""

    spark: SparkSession
    settings: MonitorSettings
    now: datetime
    results: dict[str, DataFrame] = field(default_factory=dict)  # by query, for the rules
    shown: dict[str, pd.DataFrame] = field(default_factory=dict)  # the same, for the page
    outcomes: list[Outcome] = field(default_factory=list)
    alerts: list[Alert] = field(default_factory=list)

    @property
    def window(self) -> datetime:
        """Start of the time whose requests are checked."""
        return self.now - timedelta(hours=self.settings.hours)

    @property
    def history(self) -> datetime:
        """Start of the time that is compared and shown."""
        return self.now - timedelta(days=self.settings.days)

    @property
    def arrived(self) -> datetime:
        """Time up to which the inference table has all requests: they arrive late."""
        return self.now - timedelta(minutes=self.settings.delay_minutes)

    def run(self, name: str, **parameters: Any) -> list[dict[str, Any]]:
        """Run a query, keep its result, and return its rows."""
        logger.info("running query %s", name)
        result = queries.run(self.spark, name, **parameters)
        rows = queries.collect(result)
        self.results[name] = local_frame(self.spark, [list(row.values()) for row in rows], result.schema)
        self.shown[name] = pd.DataFrame(rows, columns=result.columns, dtype=object)
        return rows


def monitor(spark: SparkSession, settings: MonitorSettings, *, now: datetime | None = None) -> MonitorResult:
    """Check the tables at the time `now`, write the page, post the alerts.

    Raises
    ------
    ConfigError
        No table is named, a named table does not exist, or the page cannot be written; nothing was posted.
    """
    if not (settings.inference_table or settings.output_table or settings.runs_table):
        raise ConfigError("monitor needs --inference-table, --output-table or --runs-table")
    webpage.check(settings.report)
    health = HealthCheck(spark, settings, now or datetime.now(UTC))
    result = check(health)
    if rules.status(health.alerts) != "ok" and (url := os.environ.get(WEBHOOK)):
        health.alerts += _post(url, settings, health.alerts)
    for alert in health.alerts:
        level = logging.INFO if alert.severity == "info" else logging.WARNING
        logger.log(level, "%s %s: %s", alert.severity, alert.rule, alert.message)
    if settings.report:
        page.write(settings, health.shown, health.outcomes, health.alerts, health.now)
    return replace(_verdict(health), endpoint=result.endpoint, batch=result.batch, report=settings.report)


def check(health: HealthCheck) -> MonitorResult:
    """Query the tables that the settings name and check the rules: return status, alerts and key figures."""
    settings = health.settings
    endpoint = _query_endpoint(health) if settings.inference_table else None
    batch = _query_batch(health) if settings.output_table or settings.runs_table else None
    health.outcomes = rules.outcomes(health.results, settings, health.now)
    health.alerts += [alert for outcome in health.outcomes for alert in outcome.alerts]
    return replace(_verdict(health), endpoint=endpoint, batch=batch)


def _verdict(health: HealthCheck) -> MonitorResult:
    status = rules.status(health.alerts)
    fails = status in ("critical", health.settings.fail_on)
    return MonitorResult(exit_code=ALERTS if fails else OK, status=status, alerts=list(health.alerts))


def _query_endpoint(health: HealthCheck) -> EndpointFigures:
    settings = health.settings
    view = requests_view(health.spark, settings.inference_table, settings.requests_view)
    (window,) = health.run("endpoint_health", requests=view, since=health.window)
    health.run("traffic", requests=view, since=health.history, until=health.now + timedelta(hours=1))
    # the page shows the current hour too; an hour is compared once the table can hold all of its requests
    full_hours = F.col("hour") < F.date_trunc("hour", F.lit(health.arrived))
    health.results["traffic"] = health.results["traffic"].where(full_hours)
    health.run("version_days", requests=view, since=health.history)
    if settings.report:
        shown = {"requests": view, "since": health.history}
        for name in ("daily_performance", "errors", "versions", "requesters", "payloads"):
            health.run(name, **shown)
        health.run("slow_requests", **shown, slow_ms=settings.slow_ms, limit=TABLE_ROWS)
        health.run("recent_requests", **shown, limit=TABLE_ROWS)
    return EndpointFigures(**{figure.name: window[figure.name] for figure in fields(EndpointFigures)})


def _query_batch(health: HealthCheck) -> LastRun:
    settings, spark = health.settings, health.spark
    runs_table = settings.runs_table or tables.beside(tables.table_name(settings.output_table), "_runs")
    runs_view = readable(spark, runs_table, "scgpt_runs")
    runs = health.run("last_runs", runs=runs_view, limit=TABLE_ROWS)
    output = settings.output_table or (runs[0]["output_table"] if runs else "")
    if output:
        embeddings = readable(spark, output, "scgpt_embeddings")
        name = "collapse_cells" if "cell_id" in spark.table(embeddings).columns else "collapse_genes"
        health.run(name, embeddings=embeddings, since=health.history, sample=SAMPLE)
    if settings.report and runs:
        _query_batch_details(health, runs_view, output, runs[0]["input_table"])
    return LastRun(runs[0]["run_id"], runs[0]["status"]) if runs else LastRun(None, None)


def _query_batch_details(health: HealthCheck, runs_view: str, output: str, rows_table: str) -> None:
    spark, since = health.spark, health.history
    health.run("cells_per_second", runs=runs_view, since=since)
    ledger_table = health.settings.ledger_table or tables.beside(tables.table_name(output), "_ledger")
    ledger = readable(spark, ledger_table, "scgpt_ledger")
    health.run("failed_rows", ledger=ledger, since=since)
    if tables.exists(spark, rows_table):
        health.run("coverage", ledger=ledger, rows=readable(spark, rows_table, "scgpt_rows"), since=since)
    else:
        logger.warning("input table %s no longer exists: the page has no coverage by sample", rows_table)


def _post(url: str, settings: MonitorSettings, alerts: list[Alert]) -> list[Alert]:
    """Post the alerts in Slack's format; return an alert when they cannot be posted."""
    table = settings.inference_table or settings.output_table or settings.runs_table
    lines = [f"scgpt-batch: {table} is {rules.status(alerts)}"]
    lines += [f"• {alert.severity} {alert.rule}: {alert.message}" for alert in alerts]
    text = "\n".join(lines).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    try:
        response = requests.post(url, json={"text": text}, timeout=WEBHOOK_TIMEOUT)
        fault = "" if response.ok else f"HTTP {response.status_code}"
    except requests.RequestException as exc:
        fault = type(exc).__name__  # its message contains the URL
    return [Alert("webhook", "critical", f"cannot post the alerts to ${WEBHOOK}: {fault}")] if fault else []

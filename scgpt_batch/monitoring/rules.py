"""The health rules, each written once: `scgpt-batch monitor` and the SQL alerts of the Databricks bundle use them.

A rule reads the result of one query of `sql/` in SQL and compares its `value` with a setting of `MonitorSettings`.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from pyspark.sql import DataFrame

from scgpt_batch.monitoring import queries
from scgpt_batch.settings import MonitorSettings, RuleName, Severity

SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")

# Names as in Databricks' SQL alerts.
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "GREATER_THAN": operator.gt, "LESS_THAN": operator.lt, "EQUAL": operator.eq, "NOT_EQUAL": operator.ne,
}  # fmt: skip


@dataclass(frozen=True)
class Alert:
    """A rule that fired: the value found, and the threshold it passed."""

    rule: str
    severity: Severity
    message: str
    value: float | str | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Rule:
    """A health rule.

    Attributes
    ----------
    severity
        The default; the setting `severity` changes it. `info` is listed and fails nothing.
    title
        What is wrong when it fires; part of the SQL alert's name.
    queries
        The queries whose result it can check. The SQL alert runs the first.
    sql
        Reads the query's result, named `result`. One row, or several ordered by the worst first: `value`, and what
        `message` shows. Parameters are settings, `:now`, and `:overdue_since` (`max_run_age_hours` before now).
    threshold
        Name of the setting that `value` is compared with, or a fixed value.
    message
        Template of the alert's message: columns of `sql`, settings, and `threshold`.
    missing
        Template of the message when `sql` returns no row; without it, the rule does not fire then.
    implied_by
        `monitor` leaves this rule out when the rule of that name has fired with the same severity or a worse one.
    measures, unit
        What `value` is, for people: "95th percentile of the duration" and "ms". The unit "%" is of a fraction.
    absent
        Template of what the page says when `sql` returns no row and the rule does not fire: settings.
    """

    name: RuleName
    severity: Severity
    title: str
    queries: tuple[str, ...]
    sql: str
    operator: str
    threshold: str | float
    message: str
    missing: str = ""
    implied_by: str = ""
    measures: str = ""
    unit: str = ""
    absent: str = ""

    def severity_in(self, settings: MonitorSettings) -> Severity:
        """Return the severity under these settings."""
        return settings.severity.get(self.name, self.severity)

    def limit(self, settings: MonitorSettings) -> float | str:
        """Return the value of the threshold."""
        if isinstance(self.threshold, str) and self.threshold in MonitorSettings.model_fields:
            return getattr(settings, self.threshold)
        return self.threshold

    def outcome(self, result: DataFrame, settings: MonitorSettings, now: datetime) -> "Outcome":
        """Check a query's result: an alert for each row beyond the threshold."""
        values = settings.model_dump() | {"now": now, "overdue_since": overdue_since(settings, now)}
        rows = queries.collect(queries.run_over(result, self.sql, values))
        if not rows and self.missing:
            return Outcome(self, (self._alert(settings, self.missing, {"value": None}),))
        if not rows:
            return Outcome(self, note=self.absent.format_map(settings.model_dump()))
        fires, limit = OPERATORS[self.operator], self.limit(settings)
        alerts = [self._alert(settings, self.message, row) for row in rows if fires(row["value"], limit)]
        return Outcome(self, tuple(alerts), rows[0]["value"], is_checked=True)

    def _alert(self, settings: MonitorSettings, template: str, row: Mapping[str, Any]) -> Alert:
        limit = self.limit(settings)
        message = template.format_map({**settings.model_dump(), "threshold": limit, **row})
        is_bound = self.operator in ("GREATER_THAN", "LESS_THAN")
        bound = limit if is_bound and not isinstance(limit, str) else None
        return Alert(self.name, self.severity_in(settings), message, row["value"], bound)


@dataclass(frozen=True)
class Outcome:
    """What a rule found.

    Attributes
    ----------
    value
        The worst value; None if there was none to check.
    is_checked
        Whether there was a value.
    note
        Why there was none, where that is not an alert.
    """

    rule: Rule
    alerts: tuple[Alert, ...] = ()
    value: Any = None
    is_checked: bool = False
    note: str = ""


def overdue_since(settings: MonitorSettings, now: datetime) -> datetime:
    """Return the time by which the last run of the batch job must have started."""
    return now - timedelta(hours=settings.max_run_age_hours)


_ERROR_SHARE = "select {0}_errors / requests as value, requests from result where {0}_errors >= :min_errors"
_ERRORS = (
    "{{value:.1%}} of {{requests:.0f}} requests in the last {{hours:g}} h ended in a {0} error, above {{threshold:.1%}}"
)
_NO_REQUESTS = "no requests in the last {hours:g} h"

RULES = (
    Rule(
        # no incident by itself: an endpoint that scales to zero may be idle
        "no_requests", "info", "no requests", ("endpoint_health",), "select requests as value from result",
        "EQUAL", 0, message=_NO_REQUESTS, missing=_NO_REQUESTS,
        measures="Requests",
    ),
    Rule(
        "error_rate", "critical", "server errors", ("endpoint_health",), _ERROR_SHARE.format("server"),
        "GREATER_THAN", "max_error_rate", message=_ERRORS.format("server"),
        measures="Requests with a server error", unit="%", absent="fewer than {min_errors} server errors",
    ),
    Rule(
        "client_error_rate", "warning", "client errors", ("endpoint_health",), _ERROR_SHARE.format("client"),
        "GREATER_THAN", "max_client_error_rate", message=_ERRORS.format("client"),
        measures="Requests with a client error", unit="%", absent="fewer than {min_errors} client errors",
    ),
    Rule(
        "p95", "warning", "slow requests", ("endpoint_health",),
        "select p95_ms as value from result where p95_ms is not null",
        "GREATER_THAN", "max_p95_ms",
        message="95th percentile of the duration is {value:,.0f} ms in the last {hours:g} h, above {threshold:,.0f} ms",
        measures="95th percentile of the duration", unit="ms", absent="no durations in the last {hours:g} h",
    ),
    Rule(
        "versions", "warning", "a canary that nobody ended", ("version_days",),
        "select\n"
        "    count(*) as value,\n"
        "    array_join(array_sort(array_distinct(flatten(collect_list(versions)))), ', ') as names\n"
        "from result having max(day) >= date_sub(cast(:now as date), 1)",
        "GREATER_THAN", "max_canary_days",
        message="several versions ({names}) answered on {value} of the last {days} days, more than {threshold}: end "
        "the canary with `scgpt-batch deploy`",
        measures="Days on which several versions answered", absent="one version, or none, since yesterday",
    ),
    Rule(
        "volume", "warning", "request volume below baseline", ("traffic",),
        "select share_of_usual as value, requests, usual, hour\n"
        "from result\n"
        "where\n"
        "    hour = (select max(hour) from result)\n"
        "    and usual >= :min_usual_requests\n"
        "    and share_of_usual is not null",
        "LESS_THAN", "min_volume",
        message="{requests:.0f} requests in the hour from {hour:%Y-%m-%d %H:%M}, {value:.0%} of the usual {usual:.0f}",
        implied_by="no_requests",
        measures="Requests in the last full hour, of the usual number", unit="%",
        absent="no hour with a baseline of {min_usual_requests:g} requests",
    ),
    Rule(
        "run_late", "warning", "no run finished in time", ("last_runs",),
        "select timestampdiff(second, max(finished_at), :now) / 3600 as value\n"
        "from result where status = 'finished' having max(finished_at) is not null",
        "GREATER_THAN", "max_run_age_hours",
        message="the last finished run ended {value:.0f} h ago, more than {threshold:g} h",
        missing="no run of the batch job has finished",
        measures="Time since the last finished run", unit="h",
    ),
    Rule(
        # Of each mode: a run in one mode says nothing of another. A run still 'running' after this time was killed.
        "run_failed", "critical", "the last run failed", ("last_runs",),
        "select status as value, run_id, mode\n"
        "from (\n"
        "    select *, row_number() over (partition by mode order by started_at desc) as age\n"
        "    from result where status <> 'running' or started_at < :overdue_since\n"
        ") where age = 1\n"
        "order by status = 'finished', started_at desc",
        "NOT_EQUAL", "finished",
        message="the last run in {mode} mode, {run_id}, ended with status {value!r}",
        measures="Status of the last run", absent="no run has ended",
    ),
    Rule(
        # the newest run of each mode that had rows to embed: a later run without any mended nothing
        "rows_failed", "critical", "many rows failed", ("last_runs",),
        "select rows_failed / (rows_ok + rows_failed) as value, rows_failed, run_id, mode\n"
        "from (\n"
        "    select *, row_number() over (partition by mode order by started_at desc) as age\n"
        "    from result where status = 'finished' and rows_ok + rows_failed > 0\n"
        ") where age = 1 and finished_at >= :overdue_since\n"
        "order by value desc",
        "GREATER_THAN", "max_failed_fraction",
        message="run {run_id} ({mode}): {value:.0%} of its rows failed ({rows_failed})",
        measures="Failed rows of the newest run", unit="%",
        absent="no run in the last {max_run_age_hours:g} h had rows",
    ),
    Rule(
        "collapse", "critical", "all vectors of a run are alike", ("collapse_genes", "collapse_cells"),
        "select if(distinct_vectors = 1, 1.0, mean_cosine) as value, run_id, sampled, distinct_vectors, mean_cosine\n"
        "from result where sampled >= 2 and mean_cosine is not null\n"
        "order by value desc",
        "GREATER_THAN", "max_cosine",
        message="run {run_id}: all its vectors are alike ({distinct_vectors} distinct of {sampled} compared, mean "
        "cosine {mean_cosine:.5f})",
        measures="Mean cosine between vectors of a run", absent="no vectors to compare",
    ),
)  # fmt: skip


def outcomes(results: Mapping[str, DataFrame], settings: MonitorSettings, now: datetime) -> list[Outcome]:
    """Check the rules whose query has a result, and say of the ignored ones that they are."""
    found: list[Outcome] = []
    for rule in RULES:
        result = next((results[name] for name in rule.queries if name in results), None)
        if result is None:
            continue
        alerts = [alert for outcome in found for alert in outcome.alerts]
        if rule.name in settings.ignore:
            found.append(Outcome(rule, note="ignored"))
        elif _is_implied(rule, alerts, settings):
            found.append(Outcome(rule, note=f"not checked: {rule.implied_by} fired"))
        else:
            found.append(rule.outcome(result, settings, now))
    return found


def check(results: Mapping[str, DataFrame], settings: MonitorSettings, now: datetime) -> list[Alert]:
    """Check the rules whose query has a result; return the alerts."""
    return [alert for outcome in outcomes(results, settings, now) for alert in outcome.alerts]


def _is_implied(rule: Rule, found: Iterable[Alert], settings: MonitorSettings) -> bool:
    """Whether an alert that says as much, and is as severe, was found already."""
    least = SEVERITIES.index(rule.severity_in(settings))
    return any(alert.rule == rule.implied_by and SEVERITIES.index(alert.severity) >= least for alert in found)


def status(alerts: Iterable[Alert]) -> str:
    """Return the worst severity; `ok` without an alert, and for alerts that only inform."""
    found = {alert.severity for alert in alerts} - {"info"}
    return next((severity for severity in reversed(SEVERITIES) if severity in found), "ok")

"""The rules of health, over what the SQL found; thresholds are `MonitorSettings`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from scgpt_batch.settings import MonitorSettings

Severity = Literal["warning", "critical"]
SEVERITIES: tuple[Severity, ...] = ("warning", "critical")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Alert:
    """One broken rule: what was found, and beyond which threshold."""

    rule: str
    severity: Severity
    message: str
    value: float | str | None = None
    threshold: float | None = None


def status(alerts: Iterable[Alert]) -> str:
    """Return the worst severity, `ok` without any alert."""
    found = {alert.severity for alert in alerts}
    return next((severity for severity in reversed(SEVERITIES) if severity in found), "ok")


def endpoint_alerts(health: Row, last_hour: Row, limits: MonitorSettings) -> list[Alert]:
    """Judge the endpoint by the answers of `endpoint_health` and the newest hour of `traffic`."""
    within = f"in the last {limits.hours:g} h"
    if not health["requests"]:
        return [Alert("no_requests", "critical", f"no requests {within}", 0)]
    alerts = _errors(health, limits, within)
    if (p95 := health["p95_ms"]) is not None and p95 > limits.max_p95_ms:
        told = f"one request in twenty took {p95:,.0f} ms or more {within}, above {limits.max_p95_ms:,.0f} ms"
        alerts.append(Alert("p95", "warning", told, p95, limits.max_p95_ms))
    if len(versions := list(health["versions"])) > 1:
        told = f"{len(versions)} versions answered {within}: {', '.join(versions)}"
        alerts.append(Alert("versions", "warning", told, len(versions), 1))
    return alerts + _volume(last_hour, limits)


def _errors(health: Row, limits: MonitorSettings, within: str) -> list[Alert]:
    """Judge server errors and client errors (status 4xx) apart; a few errors say nothing about a share."""
    alerts = []
    kinds: tuple[tuple[str, Severity, str, float], ...] = (
        ("error_rate", "critical", "server", limits.max_error_rate),
        ("client_error_rate", "warning", "client", limits.max_client_error_rate),
    )
    for rule, severity, kind, limit in kinds:
        errors = health[f"{kind}_errors"]
        rate = errors / health["requests"]
        if errors >= limits.min_errors and rate > limit:
            told = (
                f"{rate:.1%} of {health['requests']:.0f} requests ended in a {kind} error {within}, above {limit:.1%}"
            )
            alerts.append(Alert(rule, severity, told, rate, limit))
    return alerts


def _volume(last_hour: Row, limits: MonitorSettings) -> list[Alert]:
    usual, share = last_hour["usual"], last_hour["share_of_usual"]
    if usual is None or usual < limits.min_usual_requests or share >= limits.min_volume:
        return []
    told = (
        f"{last_hour['requests']:.0f} requests in the hour from {last_hour['hour']:%Y-%m-%d %H:%M}, "
        f"{share:.0%} of the usual {usual:.0f}"
    )
    return [Alert("volume", "warning", told, share, limits.min_volume)]


def batch_alerts(runs: Sequence[Row], collapse: Iterable[Row], limits: MonitorSettings, now: datetime) -> list[Alert]:
    """Judge the batch job by the answers of `last_runs` (newest first) and `collapse_cells` or `collapse_genes`."""
    alerts = _late(runs, limits, now)
    ended = [run for run in runs if not _at_work(run, limits, now)]
    if ended and ended[0]["status"] != "finished":
        told = f"the last run, {ended[0]['run_id']}, ended as {ended[0]['status']!r}"
        alerts.append(Alert("run_failed", "critical", told, ended[0]["status"]))
    alerts += _failed_rows(runs, limits, now)
    for run in collapse:
        if _collapsed(run, limits):
            told = (
                f"run {run['run_id']}: its vectors are all alike ({run['distinct_vectors']} distinct of "
                f"{run['sampled']} compared, mean cosine {run['mean_cosine']:.5f})"
            )
            alerts.append(Alert("collapse", "critical", told, run["mean_cosine"], limits.max_cosine))
    return alerts


def _late(runs: Sequence[Row], limits: MonitorSettings, now: datetime) -> list[Alert]:
    finished = [run["finished_at"] for run in runs if run["status"] == "finished"]
    if not finished:
        return [Alert("run_late", "warning", "no run of the batch job has finished", None, limits.max_run_age_hours)]
    age = _hours(max(finished), now)
    if age <= limits.max_run_age_hours:
        return []
    told = f"the last run that finished did so {age:.0f} h ago, more than {limits.max_run_age_hours:g} h"
    return [Alert("run_late", "warning", told, age, limits.max_run_age_hours)]


def _at_work(run: Row, limits: MonitorSettings, now: datetime) -> bool:
    """Tell whether a run is not over; one that began longer ago than runs are apart was killed."""
    return run["status"] == "running" and _hours(run["started_at"], now) <= limits.max_run_age_hours


def _failed_rows(runs: Sequence[Row], limits: MonitorSettings, now: datetime) -> list[Alert]:
    """Judge the newest run of each mode that had rows to embed; a run after it that had none mended nothing."""
    newest: dict[str, Row] = {}
    for run in runs:
        if run["status"] == "finished" and run["rows_ok"] + run["rows_failed"] > 0:
            newest.setdefault(run["mode"], run)
    alerts = []
    for run in newest.values():
        failed = run["rows_failed"] / (run["rows_ok"] + run["rows_failed"])
        if failed > limits.max_failed_fraction and _hours(run["finished_at"], now) <= limits.max_run_age_hours:
            told = f"run {run['run_id']} ({run['mode']}): {failed:.0%} of its rows failed ({run['rows_failed']})"
            alerts.append(Alert("rows_failed", "critical", told, failed, limits.max_failed_fraction))
    return alerts


def _hours(since: datetime, now: datetime) -> float:
    return (now - since).total_seconds() / 3600


def _collapsed(run: Row, limits: MonitorSettings) -> bool:
    """Tell whether a run's vectors are all alike; one vector alone tells nothing."""
    if run["sampled"] < 2 or run["mean_cosine"] is None:
        return False
    return run["distinct_vectors"] == 1 or run["mean_cosine"] > limits.max_cosine

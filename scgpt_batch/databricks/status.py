"""The command `scgpt-batch status`: the state of a Databricks endpoint and, through Spark, the health of its tables."""

import logging
from datetime import UTC, datetime
from typing import Any

from databricks.sdk import WorkspaceClient
from databricks.sdk.errors import DatabricksError
from prometheus_client.parser import text_string_to_metric_families

from scgpt_batch.databricks import workspace as ws
from scgpt_batch.errors import ConfigError
from scgpt_batch.settings import MonitorSettings, StatusSettings, Summary

logger = logging.getLogger(__name__)

ENDPOINT_LABELS = ("endpoint_id", "endpoint_name", "workspace_id")  # the same for every metric


def status(settings: StatusSettings) -> Summary:
    """Return the endpoint's state, versions, last log lines and metrics, and the health of the tables that are named.

    Raises
    ------
    ConfigError
        The endpoint or a table does not exist, or the credentials or permissions are missing.
    """
    workspace = ws.connect(settings.retry_seconds)
    endpoint = ws.find_endpoint(workspace, settings.endpoint)
    if endpoint is None:
        raise ConfigError(
            f"{workspace.config.host} has no endpoint {settings.endpoint!r}: create it with `scgpt-batch deploy`"
        )
    served, pending = ws.served(endpoint), ws.pending(endpoint)
    names = [str(line["name"]) for line in served + pending]
    summary: Summary = {
        "endpoint": settings.endpoint,
        "state": ws.state(endpoint),
        "served": served,
        "pending": pending,
        "build_log": {name: ws.last_log_line(workspace, settings.endpoint, name, build=True) for name in names},
        "server_log": {name: ws.last_log_line(workspace, settings.endpoint, name, build=False) for name in names},
        "metrics": _metrics(workspace, settings.endpoint),
        "inference_table": ws.gateway_table(endpoint),
    }
    if settings.inference_table or settings.output_table or settings.runs_table:
        summary["health"] = _health(settings)
    _log(summary)
    return summary


def _metrics(workspace: WorkspaceClient, name: str) -> dict[str, dict[str, float]]:
    """Return the metrics of the last minute: name -> version -> value; for histograms, sum and count only."""
    try:
        contents = workspace.serving_endpoints.export_metrics(name).contents
    except DatabricksError as exc:  # there are none while nothing runs
        logger.info("no metrics: %s", exc)
        return {}
    assert contents is not None
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(contents.read().decode()):
        for sample in family.samples:
            if not sample.name.endswith(("_bucket", "_created")):
                labels = [value for label, value in sample.labels.items() if label not in ENDPOINT_LABELS]
                found.setdefault(sample.name, {})[" ".join(labels)] = sample.value
    return found


def _health(settings: StatusSettings) -> dict[str, Any]:
    from scgpt_batch.monitoring.monitor import HealthCheck, check  # needs Spark, the rest of `status` does not
    from scgpt_batch.spark.session import get_spark

    named = settings.model_dump(include={"inference_table", "output_table", "runs_table"})
    monitored = MonitorSettings.model_validate(named)
    return check(HealthCheck(get_spark(settings.spark_conf), monitored, datetime.now(UTC)))


def _log(summary: Summary) -> None:
    logger.info(
        "endpoint %s: %s; inference table %s", summary["endpoint"], summary["state"], summary["inference_table"]
    )
    for line in summary["served"]:
        logger.info("serving %(name)s: %(traffic)d %%, %(workload)s, %(state)s", line)
    for line in summary["pending"]:
        logger.info("pending %(name)s: %(workload)s, %(state)s", line)
    for kind in ("build_log", "server_log"):
        for name, last in summary[kind].items():
            logger.info("last line of the %s of %s: %s", kind.replace("_", " "), name, last or "-")
    for alert in summary.get("health", {}).get("alerts", []):
        logger.warning("%(severity)s %(rule)s: %(message)s", alert)

"""The command `scgpt-batch status`: how a Databricks endpoint is, and by Spark its tables and the nightly run."""

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

ENDPOINT_LABELS = ("endpoint_id", "endpoint_name", "workspace_id")  # the same in every line


def status(settings: StatusSettings) -> Summary:
    """Read the endpoint's state, versions, last log lines and metrics; judge its tables where they are named.

    Raises
    ------
    ConfigError
        There is no such endpoint or table, no login, or not the right to look.
    """
    workspace = ws.connect(settings.retry_seconds)
    endpoint = ws.find_endpoint(workspace, settings.endpoint)
    if endpoint is None:
        raise ConfigError(f"no endpoint {settings.endpoint!r} in {workspace.config.host}: see scgpt-batch deploy")
    served, pending = ws.served(endpoint), ws.pending(endpoint)
    names = [str(line["name"]) for line in served + pending]
    told: Summary = {
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
        told["health"] = _health(settings)
    _tell(told)
    return told


def _metrics(workspace: WorkspaceClient, name: str) -> dict[str, dict[str, float]]:
    """Read the newest minute's metrics: name -> version -> value; of histograms sum and count only."""
    try:
        contents = workspace.serving_endpoints.export_metrics(name).contents
    except DatabricksError as exc:  # none while nothing runs
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
    asked = MonitorSettings.model_validate(named)
    return check(HealthCheck(get_spark(settings.spark_conf), asked, datetime.now(UTC)))


def _tell(told: Summary) -> None:
    """Log the summary for people."""
    logger.info("endpoint %s: %s; inference table %s", told["endpoint"], told["state"], told["inference_table"])
    for line in told["served"]:
        logger.info("%(name)s: %(traffic)d %%, %(workload)s, %(state)s", line)
    for line in told["pending"]:
        logger.info("coming: %(name)s, %(workload)s, %(state)s", line)
    for kind in ("build_log", "server_log"):
        for name, said in told[kind].items():
            logger.info("%s of %s ends: %s", kind.replace("_", " "), name, said or "-")
    for alert in told.get("health", {}).get("alerts", []):
        logger.warning("%(severity)s %(rule)s: %(message)s", alert)

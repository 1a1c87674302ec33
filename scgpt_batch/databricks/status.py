"""The command `scgpt-batch status`: the state of a Databricks endpoint and, through Spark, the health of its tables."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from databricks.sdk import WorkspaceClient
from databricks.sdk.errors import DatabricksError
from prometheus_client.parser import text_string_to_metric_families

from scgpt_batch.command_result import CommandResult
from scgpt_batch.databricks import workspace as ws
from scgpt_batch.errors import GPU_UNUSABLE, ConfigError
from scgpt_batch.settings import MonitorSettings, StatusSettings

if TYPE_CHECKING:
    from scgpt_batch.monitoring.monitor import MonitorResult

logger = logging.getLogger(__name__)

ENDPOINT_LABELS = ("endpoint_id", "endpoint_name", "workspace_id")  # the same for every metric


@dataclass(frozen=True, kw_only=True)
class StatusResult(CommandResult):
    """The state of an endpoint, and of its tables where they were named."""

    endpoint: str
    state: str
    served: list[dict[str, Any]]  # name, model, version, workload, state, traffic
    pending: list[dict[str, Any]]  # the same without traffic
    build_log: dict[str, str]  # served entity -> last line
    server_log: dict[str, str]
    gpu_problem: dict[str, str]  # served entity -> why its GPU is not used, if its log says so
    metrics: dict[str, dict[str, float]]  # name -> version -> value
    inference_table: str | None
    health: "MonitorResult | None" = None

    def to_dict(self) -> dict[str, Any]:
        """Return the values of the JSON line; `health` only where tables were named."""
        values = super().to_dict()
        del values["health"]
        return values | ({"health": self.health.to_dict()} if self.health else {})

    def lines(self) -> list[str]:
        """Say the state, each version's, the ends of its logs, and the health of the tables."""
        lines = [f"endpoint {self.endpoint}: {self.state}; inference table: {self.inference_table or 'none'}"]
        lines += ["{name}: {traffic} % of the traffic, {workload}, {state}".format_map(each) for each in self.served]
        lines += ["pending: {name}, {workload}, {state}".format_map(each) for each in self.pending]
        for kind, logs in (("build log", self.build_log), ("server log", self.server_log)):
            lines += [f"last line of the {kind} of {name}: {line or '-'}" for name, line in logs.items()]
        lines += [f"GPU of {name} is not used: {line}" for name, line in self.gpu_problem.items()]
        return lines + (self.health.lines() if self.health else [])


def status(settings: StatusSettings) -> StatusResult:
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
    build, server = (
        {name: ws.log_lines(workspace, settings.endpoint, name, build=build) for name in names}
        for build in (True, False)
    )
    names_tables = settings.inference_table or settings.output_table or settings.runs_table
    return StatusResult(
        endpoint=settings.endpoint,
        state=ws.state(endpoint),
        served=served,
        pending=pending,
        build_log={name: _last(lines) for name, lines in build.items()},
        server_log={name: _last(lines) for name, lines in server.items()},
        gpu_problem=_gpu_problems(server),
        metrics=_metrics(workspace, settings.endpoint),
        inference_table=ws.gateway_table(endpoint),
        health=_health(settings) if names_tables else None,
    )


def _last(lines: Sequence[str]) -> str:
    return lines[-1] if lines else ""


def _gpu_problems(logs: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the last line about an unusable GPU in each version's log, where there is one."""
    found = {name: [line for line in lines if GPU_UNUSABLE in line] for name, lines in logs.items()}
    return {name: lines[-1] for name, lines in found.items() if lines}


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


def _health(settings: StatusSettings) -> "MonitorResult":
    from scgpt_batch.monitoring.monitor import HealthCheck, check  # needs Spark, the rest of `status` does not
    from scgpt_batch.spark.session import get_spark

    named = settings.model_dump(include={"inference_table", "output_table", "runs_table"})
    monitored = MonitorSettings.model_validate(named)
    return check(HealthCheck(get_spark(settings.spark_conf), monitored, datetime.now(UTC)))

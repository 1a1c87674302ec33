"""The command `scgpt-batch deploy`: bring a Databricks serving endpoint to the state that the settings describe.

Idempotent: only what differs from the endpoint's current state is changed, and a run after a failure completes the
update. Databricks keeps serving the old version until the new one is ready.
"""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from databricks.sdk import WorkspaceClient
from databricks.sdk.errors import NotFound, ResourceConflict
from databricks.sdk.service.catalog import ModelVersionInfo, ModelVersionInfoStatus
from databricks.sdk.service.serving import (
    AiGatewayConfig,
    AiGatewayInferenceTableConfig,
    AiGatewayUsageTrackingConfig,
    AutoCaptureConfigInput,
    EndpointCoreConfigInput,
    EndpointTag,
    Route,
    ServedEntityInput,
    ServingEndpointAccessControlRequest,
    ServingEndpointDetailed,
    ServingEndpointPermissionLevel,
    ServingModelWorkloadType,
    TrafficConfig,
)

from scgpt_batch.command_result import CommandResult
from scgpt_batch.databricks import workspace as ws
from scgpt_batch.databricks.workspace import explained
from scgpt_batch.errors import ConfigError, ScgptBatchError
from scgpt_batch.settings import DeploySettings

logger = logging.getLogger(__name__)

MODEL_URI = re.compile(r"models:/(?P<name>[^./@\s]+\.[^./@\s]+\.[^./@\s]+)(/(?P<version>\d+)|@(?P<alias>[^/@\s]+))")
APPLICATION_ID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")  # of a service principal
PREVIOUS = "scgpt_batch_previous_version"  # a tag of the endpoint, read by --rollback
MANAGE = "CAN MANAGE on the endpoint"


@dataclass(frozen=True)
class Goal:
    """The target state of the endpoint."""

    model: str
    version: str  # the new one
    old: str | None  # the version that served before, if any
    entities: list[ServedEntityInput]
    traffic: dict[str, int]
    table: str | None  # inference table; None: requests are not logged


@dataclass(frozen=True)
class Change:
    """One step from the endpoint's current state to the goal."""

    description: str
    apply: Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class DeployResult(CommandResult):
    """The endpoint after the command, and what was changed."""

    endpoint: str
    state: str
    model: str
    version: str
    traffic: dict[str, int]  # served entity -> percent
    inference_table: str | None
    url: str
    changes: list[str]
    plan: bool
    seconds: float

    def lines(self) -> list[str]:
        """List the changes, then the endpoint's state."""
        made = "would change" if self.plan else "changed"
        traffic = ", ".join(f"{name} {percent} %" for name, percent in self.traffic.items())
        return [
            *(f"{made}: {change}" for change in self.changes or ["nothing"]),
            f"endpoint {self.endpoint}: {self.state}; {self.model} version {self.version}; traffic: {traffic}",
            f"inference table: {self.inference_table or 'none'}",
            self.url,
        ]


def deploy(settings: DeploySettings) -> DeployResult:
    """Create or update the endpoint and wait until it serves the requested version; with `plan`, only list changes.

    Raises
    ------
    ConfigError
        A name, version or permission is missing, or a person would create the endpoint. What the message names was not
        changed.
    ScgptBatchError
        Databricks could not apply the update. The old version keeps serving; run the same command again.
    """
    started = time.monotonic()
    workspace = ws.connect(settings.retry_seconds)
    endpoint = ws.find_endpoint(workspace, settings.endpoint)
    if endpoint and ws.is_updating(endpoint) and not settings.plan:
        logger.info("endpoint %s has another update in progress: waiting for it to end", settings.endpoint)
        endpoint = _wait(workspace, settings, lambda now: not ws.is_updating(now))
    goal = _goal(workspace, settings, endpoint)
    changes = _changes(workspace, settings, endpoint, goal)
    descriptions = [change.description for change in changes]
    for description in descriptions:
        logger.info("%s: %s", "would change" if settings.plan else "changing", description)
    if not settings.plan:
        for change in changes:
            change.apply()
        endpoint = _wait_until_serving(workspace, settings, goal)
    return DeployResult(
        endpoint=settings.endpoint,
        state=ws.state(endpoint) if endpoint else "NOT_THERE",
        model=goal.model,
        version=goal.version,
        traffic=goal.traffic,
        inference_table=goal.table,
        url=f"{workspace.config.host}/serving-endpoints/{settings.endpoint}/invocations",
        changes=descriptions,
        plan=settings.plan,
        seconds=round(time.monotonic() - started, 1),
    )


# The goal


def _goal(workspace: WorkspaceClient, settings: DeploySettings, endpoint: ServingEndpointDetailed | None) -> Goal:
    model, version = _rolled_back(settings, endpoint) if settings.rollback else _requested(workspace, settings)
    _check_version(workspace, model, version)
    _check_model(settings.endpoint, endpoint, model)
    outputs = ws.entities(endpoint) if endpoint else []
    served = {entity.entity_version: ServedEntityInput.from_dict(entity.as_dict()) for entity in outputs}
    old = _previous_version(endpoint, version)
    new = served.get(version) or replace(
        served.get(old) or ServedEntityInput(),  # keeps what others set on it, such as environment variables
        name=_entity_name(model, version),
        entity_name=model,
        entity_version=version,
    )
    if not (settings.rollback and served):  # a roll-back keeps the current compute
        new = _with_compute(new, settings)
    entities, traffic = [new], {new.name or "": 100}
    if settings.traffic:
        kept = served.get(old)
        if kept is None:
            raise ConfigError(
                f"--traffic cannot split requests: endpoint {settings.endpoint!r} serves no other version than "
                f"{version}; deploy without --traffic"
            )
        entities = [kept, new]
        traffic = {kept.name or "": 100 - settings.new_share, new.name or "": settings.new_share}
    return Goal(model, version, old, entities, traffic, _table(workspace, settings, endpoint, model))


def _requested(workspace: WorkspaceClient, settings: DeploySettings) -> tuple[str, str]:
    """Return model and version of the URI. An alias is resolved to its version: endpoints do not accept aliases."""
    match = MODEL_URI.fullmatch(settings.model_uri)
    if match is None:
        raise ConfigError(
            f"cannot deploy {settings.model_uri!r}: endpoints serve models of Unity Catalog. Use "
            "models:/catalog.schema.name@alias or models:/catalog.schema.name/version"
        )
    if match["version"]:
        return match["name"], match["version"]
    found = _found(
        lambda: workspace.model_versions.get_by_alias(match["name"], match["alias"]),
        f"Unity Catalog has no model {match['name']} with alias {match['alias']!r}: run register with --alias",
    )
    logger.info("%s is version %s", settings.model_uri, found.version)
    return match["name"], str(found.version)


def _rolled_back(settings: DeploySettings, endpoint: ServingEndpointDetailed | None) -> tuple[str, str]:
    tags = {tag.key: tag.value for tag in (endpoint.tags or [])} if endpoint else {}
    if endpoint is None or not ws.entities(endpoint) or not tags.get(PREVIOUS):
        raise ConfigError(
            f"cannot roll back: endpoint {settings.endpoint!r} has no record of an earlier version. Deploy the version "
            "you want with --model-uri models:/catalog.schema.name/version"
        )
    return str(ws.entities(endpoint)[0].entity_name), str(tags[PREVIOUS])


def _check_version(workspace: WorkspaceClient, model: str, version: str) -> None:
    found = _found(
        lambda: workspace.model_versions.get(model, int(version)),
        f"Unity Catalog has no version {version} of model {model}: check --model-uri",
    )
    if found.status not in (None, ModelVersionInfoStatus.READY):
        raise ConfigError(
            f"version {version} of {model} is not ready to serve ({found.status.value}): register it again"
        )


def _found(read: Callable[[], ModelVersionInfo], missing: str) -> ModelVersionInfo:
    with explained("read the model", permission="EXECUTE on the model, USE CATALOG and USE SCHEMA above it"):
        try:
            return read()
        except NotFound as exc:
            raise ConfigError(f"{missing} ({exc})") from exc


def _check_model(name: str, endpoint: ServingEndpointDetailed | None, model: str) -> None:
    """Raise ConfigError if the endpoint serves another model."""
    for line in [*ws.served(endpoint), *ws.pending(endpoint)] if endpoint else []:
        if line["model"] != model:
            other = line["model"] or line["name"]
            raise ConfigError(
                f"endpoint {name!r} serves {other}, not {model}: use another --endpoint, or delete this one"
            )


def _previous_version(endpoint: ServingEndpointDetailed | None, version: str) -> str | None:
    """Return the version, other than the new one, that gets most of the traffic now."""
    others = [line for line in ws.served(endpoint) if line["version"] != version] if endpoint else []
    return max(others, key=lambda line: line["traffic"])["version"] if others else None


def _entity_name(model: str, version: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", f"{model.split('.')[-1]}-{version}")


def _workload_type(name: str) -> ServingModelWorkloadType:
    try:
        return ServingModelWorkloadType(name)
    except ValueError as exc:
        known = ", ".join(kind.value for kind in ServingModelWorkloadType)
        raise ConfigError(f"unknown --workload-type {name!r}: use one of {known}") from exc


def _with_compute(entity: ServedEntityInput, settings: DeploySettings) -> ServedEntityInput:
    return replace(
        entity,
        workload_type=_workload_type(settings.workload_type),
        workload_size=settings.workload_size,
        scale_to_zero_enabled=settings.scale_to_zero,
        min_provisioned_concurrency=None,  # the API accepts either these or a size
        max_provisioned_concurrency=None,
    )


def _table(
    workspace: WorkspaceClient, settings: DeploySettings, endpoint: ServingEndpointDetailed | None, model: str
) -> str | None:
    """Return the inference table: the endpoint's own, else a new name, because Databricks creates the table itself."""
    given, has = settings.inference_table, ws.gateway_table(endpoint)
    if given == "none":
        return None
    if has and given in ("", has):
        return has
    beside = f"{model.rpartition('.')[0]}.{settings.endpoint}".replace("-", "_")
    candidates = [given] if given else [f"{beside}_payload", f"{beside}_gateway_payload"]
    for table in candidates:
        with explained(f"look up table {table}", permission="USE CATALOG and USE SCHEMA on its schema"):
            if not workspace.tables.exists(table).table_exists:
                return table
    raise ConfigError(
        f"table {candidates[-1]} exists, but Databricks logs only to tables that it creates itself: name a new "
        "one with --inference-table catalog.schema.NAME_payload"
    )


# The changes


def _changes(
    workspace: WorkspaceClient, settings: DeploySettings, endpoint: ServingEndpointDetailed | None, goal: Goal
) -> list[Change]:
    if endpoint is None:
        _check_creator(workspace, settings)
        described = [f"create endpoint {settings.endpoint}", *_differences(goal, None)]
        if goal.table:
            described.append(f"log requests and responses to {goal.table}")
        changes = [Change("; ".join(described), lambda: _create(workspace, settings, goal))]
    else:
        changes = _updates(workspace, settings, endpoint, goal)
    return changes + _grants(workspace, settings, endpoint)


def _check_creator(workspace: WorkspaceClient, settings: DeploySettings) -> None:
    """Raise ConfigError if a person would create the endpoint: it keeps this identity and fails when they leave."""
    try:
        with explained("read who is logged in"):
            name = workspace.current_user.me().user_name or ""
    except ScgptBatchError as exc:
        if not isinstance(exc.__cause__, NotFound):
            raise
        logger.info("cannot tell whether a service principal is logged in: %s", exc)
        return
    if not settings.allow_user and not APPLICATION_ID.fullmatch(name):
        raise ConfigError(
            f"endpoint {settings.endpoint!r} would run as {name} for ever, and fail when this account ends: log in as "
            "a service principal (DATABRICKS_CONFIG_PROFILE, or DATABRICKS_CLIENT_ID and DATABRICKS_CLIENT_SECRET). "
            "For an endpoint of your own use --allow-user"
        )


def _updates(
    workspace: WorkspaceClient, settings: DeploySettings, endpoint: ServingEndpointDetailed, goal: Goal
) -> list[Change]:
    return [
        *_config_change(workspace, settings, endpoint, goal),
        *_gateway_changes(workspace, settings, endpoint, goal),
    ]


def _create(workspace: WorkspaceClient, settings: DeploySettings, goal: Goal) -> None:
    table = _table_config(goal.table, enabled=True) if goal.table else None
    tracking = AiGatewayUsageTrackingConfig(enabled=True) if settings.usage_tracking else None
    core = EndpointCoreConfigInput(
        name=settings.endpoint, served_entities=goal.entities, traffic_config=_routes(goal.traffic)
    )
    permission = (
        "the entitlement to create serving endpoints, EXECUTE on the model, "
        "and CREATE TABLE on the schema of the inference table"
    )
    with explained(f"create endpoint {settings.endpoint!r}", permission=permission):
        try:
            workspace.serving_endpoints.create(
                settings.endpoint,
                config=core,
                ai_gateway=AiGatewayConfig(inference_table_config=table, usage_tracking_config=tracking)
                if table or tracking
                else None,
            )
        except ResourceConflict as exc:  # a lost response made the SDK repeat the call, or somebody else created it
            if ws.find_endpoint(workspace, settings.endpoint) is None:
                raise
            logger.info("endpoint %s exists meanwhile: %s", settings.endpoint, exc)
            endpoint = _wait(workspace, settings, lambda now: not ws.is_updating(now))
            _check_model(settings.endpoint, endpoint, goal.model)
            for change in _updates(workspace, settings, endpoint, goal):
                change.apply()
    _wait_until_serving(workspace, settings, goal)


def _config_change(
    workspace: WorkspaceClient, settings: DeploySettings, endpoint: ServingEndpointDetailed, goal: Goal
) -> list[Change]:
    legacy = endpoint.config.auto_capture_config if endpoint.config else None
    switch_off = None
    described = _differences(goal, endpoint)
    if legacy and legacy.enabled:
        switch_off = AutoCaptureConfigInput(
            catalog_name=legacy.catalog_name,
            schema_name=legacy.schema_name,
            table_name_prefix=legacy.table_name_prefix,
            enabled=False,
        )
        described.append(
            f"switch off the legacy inference table {legacy.catalog_name}.{legacy.schema_name}."
            f"{legacy.table_name_prefix}_payload, which Databricks no longer supports (it stays; `monitor` can read it)"
        )
    if not described and ws.has_failed(endpoint):
        described.append(f"request the served versions again, because the last update is {ws.state(endpoint)}")
    if not described:
        return []

    def apply() -> None:
        with explained(f"update endpoint {settings.endpoint!r}", permission=f"{MANAGE}, EXECUTE on the model"):
            if goal.old and not settings.rollback:  # before the update, so that a roll-back works if it fails
                workspace.serving_endpoints.patch(settings.endpoint, add_tags=[EndpointTag(PREVIOUS, goal.old)])
            workspace.serving_endpoints.update_config(
                settings.endpoint,
                served_entities=goal.entities,
                traffic_config=_routes(goal.traffic),
                auto_capture_config=switch_off,
            )
        _wait_until_serving(workspace, settings, goal)

    return [Change("; ".join(described), apply)]


def _differences(goal: Goal, endpoint: ServingEndpointDetailed | None) -> list[str]:
    """Describe how the goal's versions and traffic differ from the endpoint's."""
    current = {entity.name: ServedEntityInput.from_dict(entity.as_dict()) for entity in ws.entities(endpoint)} if (
        endpoint) else {}  # fmt: skip
    described = []
    for entity in goal.entities:
        wanted = _compute(entity)
        if entity.name not in current or current[entity.name].entity_version != entity.entity_version:
            described.append(f"serve {entity.name}: version {entity.entity_version} of {goal.model} on {wanted}")
        elif (now := _compute(current[entity.name])) != wanted:
            described.append(f"serve {entity.name} on {wanted} instead of {now}")
    described += [f"stop serving {name}" for name in current if name not in goal.traffic]
    shares = ws.traffic(endpoint) if endpoint else {}
    if {n: s for n, s in shares.items() if s} != {n: s for n, s in goal.traffic.items() if s}:
        described.append("traffic " + ", ".join(f"{name} {share} %" for name, share in goal.traffic.items()))
    return described


def _compute(entity: ServedEntityInput) -> str:
    kind = entity.workload_type.value if entity.workload_type else "CPU"
    size = entity.workload_size or f"{entity.min_provisioned_concurrency}-{entity.max_provisioned_concurrency}"
    return f"{kind} {size}" + (", scaled to zero" if entity.scale_to_zero_enabled else ", always on")


def _gateway_changes(
    workspace: WorkspaceClient, settings: DeploySettings, endpoint: ServingEndpointDetailed, goal: Goal
) -> list[Change]:
    current, kept = ws.gateway_table(endpoint), endpoint.ai_gateway or AiGatewayConfig()
    tracked = bool(kept.usage_tracking_config and kept.usage_tracking_config.enabled)
    described = []
    if current != goal.table:
        described += [f"stop logging requests to {current} (the table stays)"] if current else []
        described += [f"log requests and responses to {goal.table}"] if goal.table else []
    if settings.usage_tracking and not tracked:
        described.append("track usage")
    if not described:
        return []

    def put(table: AiGatewayInferenceTableConfig | None) -> None:
        tracking = AiGatewayUsageTrackingConfig(enabled=True) if settings.usage_tracking else kept.usage_tracking_config
        workspace.serving_endpoints.put_ai_gateway(
            settings.endpoint,
            inference_table_config=table,
            usage_tracking_config=tracking,
            rate_limits=kept.rate_limits,
            guardrails=kept.guardrails,
            fallback_config=kept.fallback_config,
        )

    def apply() -> None:
        with explained(f"set the inference table of {settings.endpoint!r}",
                       permission=f"{MANAGE}, and CREATE TABLE on the schema of the inference table"):  # fmt: skip
            if current and current != goal.table:  # a new name is accepted only while logging is off
                put(_table_config(current, enabled=False))
            if goal.table or not current:
                put(_table_config(goal.table, enabled=True) if goal.table else None)

    return [Change("; ".join(described), apply)]


def _table_config(table: str, *, enabled: bool) -> AiGatewayInferenceTableConfig:
    catalog, schema, name = table.split(".")
    return AiGatewayInferenceTableConfig(
        catalog_name=catalog, schema_name=schema, table_name_prefix=name.removesuffix("_payload"), enabled=enabled
    )


def _routes(traffic: dict[str, int]) -> TrafficConfig:
    return TrafficConfig([Route(served_entity_name=name, traffic_percentage=share) for name, share in traffic.items()])


def _grants(
    workspace: WorkspaceClient, settings: DeploySettings, endpoint: ServingEndpointDetailed | None
) -> list[Change]:
    """Grant CAN QUERY to the named principals; existing permissions stay."""
    names = list(settings.can_query)
    if names and endpoint:
        with explained(f"read the permissions of endpoint {settings.endpoint!r}", permission=MANAGE):
            granted = workspace.serving_endpoints.get_permissions(str(endpoint.id)).access_control_list or []
        known = {
            line.group_name or line.user_name or line.service_principal_name for line in granted if line.all_permissions
        }
        names = [name for name in names if name not in known]
    if not names:
        return []

    def apply() -> None:
        with explained(f"grant CAN QUERY on endpoint {settings.endpoint!r}", permission=MANAGE):
            found = workspace.serving_endpoints.get(settings.endpoint)
            workspace.serving_endpoints.update_permissions(
                str(found.id), access_control_list=[_grant(name) for name in names]
            )

    return [Change(f"grant CAN QUERY to {', '.join(names)}", apply)]


def _grant(name: str) -> ServingEndpointAccessControlRequest:
    """Grant to a user (an email address), a service principal (an application id) or else a group of this name."""
    is_id = APPLICATION_ID.fullmatch(name)
    field = "user_name" if "@" in name else "service_principal_name" if is_id else "group_name"
    return ServingEndpointAccessControlRequest(
        permission_level=ServingEndpointPermissionLevel.CAN_QUERY, **{field: name}
    )


# Waiting


def _wait(
    workspace: WorkspaceClient, settings: DeploySettings, until: Callable[[ServingEndpointDetailed], bool]
) -> ServingEndpointDetailed:
    return ws.wait(
        workspace,
        settings.endpoint,
        until,
        poll_seconds=settings.poll_seconds,
        timeout_minutes=settings.timeout_minutes,
    )


def _wait_until_serving(workspace: WorkspaceClient, settings: DeploySettings, goal: Goal) -> ServingEndpointDetailed:
    """Wait until the endpoint serves the goal; raise an error with the reason if the update failed."""
    endpoint = _wait(workspace, settings, lambda now: ws.is_ready(now) or ws.has_failed(now))
    if ws.has_failed(endpoint):
        raise ScgptBatchError(_failure(workspace, settings.endpoint, endpoint, goal))
    return endpoint


def _failure(workspace: WorkspaceClient, name: str, endpoint: ServingEndpointDetailed, goal: Goal) -> str:
    tried = endpoint.pending_config or endpoint.config
    messages = [
        f"{entity.name}: {entity.state.deployment_state_message}"
        for entity in (tried.served_entities if tried else None) or []
        if entity.state and entity.state.deployment_state_message
    ]
    log = ws.log_lines(workspace, name, str(goal.entities[-1].name), build=True)[-1:]
    serving = ", ".join(f"version {line['version']} ({line['traffic']} %)" for line in ws.served(endpoint))
    parts = [
        f"endpoint {name!r}: the update to version {goal.version} of {goal.model} ended as {ws.state(endpoint)}",
        *messages,
        f"last line of the build log: {log[0]}" if log else "",
        f"{serving} keeps serving" if serving else "nothing is served",
        "fix the cause and run the same command again, or deploy another version",
    ]
    return "; ".join(part for part in parts if part)

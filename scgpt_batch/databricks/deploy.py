"""The command `scgpt-batch deploy`: a Databricks serving endpoint becomes what the settings say.

The endpoint is read, compared and changed where it differs, so that a second run changes nothing and a run after any
failure does the rest. Databricks keeps serving the old version until the new one is ready.
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

from scgpt_batch.databricks import workspace as ws
from scgpt_batch.databricks.workspace import explained
from scgpt_batch.errors import ConfigError, ScgptBatchError
from scgpt_batch.settings import DeploySettings, Summary

logger = logging.getLogger(__name__)

MODEL_URI = re.compile(r"models:/(?P<name>[^./@\s]+\.[^./@\s]+\.[^./@\s]+)(/(?P<version>\d+)|@(?P<alias>[^/@\s]+))")
PREVIOUS = "scgpt_batch_previous_version"  # tag of the endpoint, for --rollback
MANAGE = "CAN MANAGE on the endpoint"


@dataclass(frozen=True)
class Goal:
    """What the endpoint shall be."""

    model: str
    version: str  # the new one
    old: str | None  # the version that served before it, where there is one
    entities: list[ServedEntityInput]
    traffic: dict[str, int]
    table: str | None  # inference table; None: no requests are kept


@dataclass(frozen=True)
class Change:
    """One step from what the endpoint is to the goal."""

    told: str
    make: Callable[[], Any]


def deploy(settings: DeploySettings) -> Summary:
    """Create the endpoint or update it, and wait until it serves what was asked for; `plan` only says what changes.

    Raises
    ------
    ConfigError
        A name, version or right is missing; nothing was changed, or what is named was not.
    ScgptBatchError
        Databricks could not do it; the old version goes on serving, and the same command tries again.
    """
    started = time.monotonic()
    workspace = ws.connect(settings.retry_seconds)
    endpoint = ws.find_endpoint(workspace, settings.endpoint)
    if endpoint and ws.is_updating(endpoint) and not settings.plan:
        logger.info("endpoint %s is being updated already: waiting for that first", settings.endpoint)
        endpoint = _waited(workspace, settings, lambda now: not ws.is_updating(now))
    goal = _goal(workspace, settings, endpoint)
    changes = _changes(workspace, settings, endpoint, goal)
    made = [change.told for change in changes]
    for told in made:
        logger.info("%s: %s", "would change" if settings.plan else "changing", told)
    if not settings.plan:
        for change in changes:
            change.make()
        endpoint = _serving(workspace, settings, goal)
    return {
        "endpoint": settings.endpoint,
        "state": ws.state(endpoint) if endpoint else "NOT_THERE",
        "model": goal.model,
        "version": goal.version,
        "traffic": goal.traffic,
        "inference_table": goal.table,
        "url": f"{workspace.config.host}/serving-endpoints/{settings.endpoint}/invocations",
        "changes": made,
        "plan": settings.plan,
        "seconds": round(time.monotonic() - started, 1),
    }


# The goal


def _goal(workspace: WorkspaceClient, settings: DeploySettings, endpoint: ServingEndpointDetailed | None) -> Goal:
    model, version = _rolled_back(settings, endpoint) if settings.rollback else _asked_for(workspace, settings)
    _check_version(workspace, model, version)
    _check_model(settings.endpoint, endpoint, model)
    outputs = ws.entities(endpoint) if endpoint else []
    served = {entity.entity_version: ServedEntityInput.from_dict(entity.as_dict()) for entity in outputs}
    old = _before(endpoint, version)
    new = served.get(version) or replace(
        served.get(old) or ServedEntityInput(),  # what others set on it, such as environment variables, stays
        name=_entity_name(model, version),
        entity_name=model,
        entity_version=version,
    )
    if not (settings.rollback and served):  # a roll-back keeps the compute that is there
        new = _sized(new, settings)
    entities, traffic = [new], {new.name or "": 100}
    if settings.traffic:
        kept = served.get(old)
        if kept is None:
            raise ConfigError(
                f"endpoint {settings.endpoint!r} serves no other version than {version}: no --traffic yet"
            )
        entities = [kept, new]
        traffic = {kept.name or "": 100 - settings.new_share, new.name or "": settings.new_share}
    return Goal(model, version, old, entities, traffic, _table(workspace, settings, endpoint, model))


def _asked_for(workspace: WorkspaceClient, settings: DeploySettings) -> tuple[str, str]:
    """Read the model URI; an alias becomes the version it stands for now, because endpoints take no alias."""
    match = MODEL_URI.fullmatch(settings.model_uri)
    if match is None:
        raise ConfigError(
            f"{settings.model_uri!r} cannot be served: endpoints serve models of Unity Catalog, "
            "models:/catalog.schema.name@alias or models:/catalog.schema.name/version"
        )
    if match["version"]:
        return match["name"], match["version"]
    found = _found(
        lambda: workspace.model_versions.get_by_alias(match["name"], match["alias"]),
        f"Unity Catalog has no model {match['name']} with an alias {match['alias']!r}: register with --alias",
    )
    logger.info("%s is version %s", settings.model_uri, found.version)
    return match["name"], str(found.version)


def _rolled_back(settings: DeploySettings, endpoint: ServingEndpointDetailed | None) -> tuple[str, str]:
    tags = {tag.key: tag.value for tag in (endpoint.tags or [])} if endpoint else {}
    if endpoint is None or not ws.entities(endpoint) or not tags.get(PREVIOUS):
        raise ConfigError(
            f"endpoint {settings.endpoint!r} remembers no earlier version: deploy the one you want, "
            "--model-uri models:/catalog.schema.name/version"
        )
    return str(ws.entities(endpoint)[0].entity_name), str(tags[PREVIOUS])


def _check_version(workspace: WorkspaceClient, model: str, version: str) -> None:
    found = _found(
        lambda: workspace.model_versions.get(model, int(version)),
        f"Unity Catalog has no version {version} of model {model}",
    )
    if found.status not in (None, ModelVersionInfoStatus.READY):
        raise ConfigError(f"version {version} of {model} is not ready to be served: {found.status.value}")


def _found(read: Callable[[], ModelVersionInfo], missing: str) -> ModelVersionInfo:
    with explained("read the model", right="EXECUTE on the model, USE CATALOG and USE SCHEMA above it"):
        try:
            return read()
        except NotFound as exc:
            raise ConfigError(f"{missing} ({exc})") from exc


def _check_model(name: str, endpoint: ServingEndpointDetailed | None, model: str) -> None:
    """Refuse to take an endpoint away from another model."""
    for line in [*ws.served(endpoint), *ws.pending(endpoint)] if endpoint else []:
        if line["model"] != model:
            other = line["model"] or line["name"]
            raise ConfigError(f"endpoint {name!r} serves {other}, not {model}: name another --endpoint, or delete it")


def _before(endpoint: ServingEndpointDetailed | None, version: str) -> str | None:
    """Return the version, other than the new one, that has the most traffic now."""
    others = [line for line in ws.served(endpoint) if line["version"] != version] if endpoint else []
    return max(others, key=lambda line: line["traffic"])["version"] if others else None


def _entity_name(model: str, version: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", f"{model.split('.')[-1]}-{version}")


def _workload_type(name: str) -> ServingModelWorkloadType:
    try:
        return ServingModelWorkloadType(name)
    except ValueError as exc:
        known = ", ".join(kind.value for kind in ServingModelWorkloadType)
        raise ConfigError(f"no workload type {name!r}: {known}") from exc


def _sized(entity: ServedEntityInput, settings: DeploySettings) -> ServedEntityInput:
    return replace(
        entity,
        workload_type=_workload_type(settings.workload_type),
        workload_size=settings.workload_size,
        scale_to_zero_enabled=settings.scale_to_zero,
        min_provisioned_concurrency=None,  # the API takes these or a size
        max_provisioned_concurrency=None,
    )


def _table(
    workspace: WorkspaceClient, settings: DeploySettings, endpoint: ServingEndpointDetailed | None, model: str
) -> str | None:
    """Name the inference table: the endpoint's own, else one that is not there yet, for Databricks makes it itself."""
    given, has = settings.inference_table, ws.gateway_table(endpoint)
    if given == "none":
        return None
    if has and given in ("", has):
        return has
    beside = f"{model.rpartition('.')[0]}.{settings.endpoint}".replace("-", "_")
    candidates = [given] if given else [f"{beside}_payload", f"{beside}_gateway_payload"]
    for table in candidates:
        with explained(f"look for table {table}", right="USE CATALOG and USE SCHEMA on its schema"):
            if not workspace.tables.exists(table).table_exists:
                return table
    raise ConfigError(
        f"table {candidates[-1]} exists, and Databricks logs to tables that it makes itself: name another one with "
        "--inference-table catalog.schema.NAME_payload"
    )


# The way there


def _changes(
    workspace: WorkspaceClient, settings: DeploySettings, endpoint: ServingEndpointDetailed | None, goal: Goal
) -> list[Change]:
    if endpoint is None:
        told = [f"create endpoint {settings.endpoint}", *_told(goal, None)]
        if goal.table:
            told.append(f"log requests and answers to {goal.table}")
        changes = [Change("; ".join(told), lambda: _create(workspace, settings, goal))]
    else:
        changes = _updates(workspace, settings, endpoint, goal)
    return changes + _grants(workspace, settings, endpoint)


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
    right = (
        "the entitlement to create serving endpoints, EXECUTE on the model, "
        "and CREATE TABLE on the schema of the inference table"
    )
    with explained(f"create endpoint {settings.endpoint!r}", right=right):
        try:
            workspace.serving_endpoints.create(
                settings.endpoint,
                config=core,
                ai_gateway=AiGatewayConfig(inference_table_config=table, usage_tracking_config=tracking)
                if table or tracking
                else None,
            )
        except ResourceConflict as exc:  # an answer was lost and the call repeated, or somebody was faster
            if ws.find_endpoint(workspace, settings.endpoint) is None:
                raise
            logger.info("endpoint %s is there meanwhile: %s", settings.endpoint, exc)
            endpoint = _waited(workspace, settings, lambda now: not ws.is_updating(now))
            _check_model(settings.endpoint, endpoint, goal.model)
            for change in _updates(workspace, settings, endpoint, goal):
                change.make()
    _serving(workspace, settings, goal)


def _config_change(
    workspace: WorkspaceClient, settings: DeploySettings, endpoint: ServingEndpointDetailed, goal: Goal
) -> list[Change]:
    legacy = endpoint.config.auto_capture_config if endpoint.config else None
    switch_off = None
    told = _told(goal, endpoint)
    if legacy and legacy.enabled:
        switch_off = AutoCaptureConfigInput(
            catalog_name=legacy.catalog_name,
            schema_name=legacy.schema_name,
            table_name_prefix=legacy.table_name_prefix,
            enabled=False,
        )
        told.append(
            f"switch off the legacy inference table {legacy.catalog_name}.{legacy.schema_name}."
            f"{legacy.table_name_prefix}_payload, which Databricks supports no more (it stays, and `monitor` reads it)"
        )
    if not told and ws.has_failed(endpoint):
        told.append(f"ask again for what is served, because the last update is {ws.state(endpoint)}")
    if not told:
        return []

    def make() -> None:
        with explained(f"update endpoint {settings.endpoint!r}", right=f"{MANAGE}, EXECUTE on the model"):
            if goal.old and not settings.rollback:  # first, so that a roll-back knows the way whatever comes next
                workspace.serving_endpoints.patch(settings.endpoint, add_tags=[EndpointTag(PREVIOUS, goal.old)])
            workspace.serving_endpoints.update_config(
                settings.endpoint,
                served_entities=goal.entities,
                traffic_config=_routes(goal.traffic),
                auto_capture_config=switch_off,
            )
        _serving(workspace, settings, goal)

    return [Change("; ".join(told), make)]


def _told(goal: Goal, endpoint: ServingEndpointDetailed | None) -> list[str]:
    """Say how the goal's versions and traffic differ from the endpoint's."""
    has = {entity.name: ServedEntityInput.from_dict(entity.as_dict()) for entity in ws.entities(endpoint)} if (
        endpoint) else {}  # fmt: skip
    told = []
    for entity in goal.entities:
        wanted = _compute(entity)
        if entity.name not in has or has[entity.name].entity_version != entity.entity_version:
            told.append(f"serve {entity.name}: version {entity.entity_version} of {goal.model} on {wanted}")
        elif (now := _compute(has[entity.name])) != wanted:
            told.append(f"serve {entity.name} on {wanted} instead of {now}")
    told += [f"stop serving {name}" for name in has if name not in goal.traffic]
    shares = ws.traffic(endpoint) if endpoint else {}
    if {n: s for n, s in shares.items() if s} != {n: s for n, s in goal.traffic.items() if s}:
        told.append("traffic " + ", ".join(f"{name} {share} %" for name, share in goal.traffic.items()))
    return told


def _compute(entity: ServedEntityInput) -> str:
    kind = entity.workload_type.value if entity.workload_type else "CPU"
    size = entity.workload_size or f"{entity.min_provisioned_concurrency}-{entity.max_provisioned_concurrency}"
    return f"{kind} {size}" + (", scaled to zero" if entity.scale_to_zero_enabled else ", always on")


def _gateway_changes(
    workspace: WorkspaceClient, settings: DeploySettings, endpoint: ServingEndpointDetailed, goal: Goal
) -> list[Change]:
    has, kept = ws.gateway_table(endpoint), endpoint.ai_gateway or AiGatewayConfig()
    tracked = bool(kept.usage_tracking_config and kept.usage_tracking_config.enabled)
    told = []
    if has != goal.table:
        told += [f"log no more requests to {has} (it stays)"] if has else []
        told += [f"log requests and answers to {goal.table}"] if goal.table else []
    if settings.usage_tracking and not tracked:
        told.append("track usage")
    if not told:
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

    def make() -> None:
        with explained(f"set the inference table of {settings.endpoint!r}",
                       right=f"{MANAGE}, and CREATE TABLE on the schema of the inference table"):  # fmt: skip
            if has and has != goal.table:  # another name is taken only when the table is off
                put(_table_config(has, enabled=False))
            if goal.table or not has:
                put(_table_config(goal.table, enabled=True) if goal.table else None)

    return [Change("; ".join(told), make)]


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
    """Let the named ask the endpoint; nobody loses a right."""
    names = list(settings.can_query)
    if names and endpoint:
        with explained(f"read who may ask {settings.endpoint!r}", right=MANAGE):
            held = workspace.serving_endpoints.get_permissions(str(endpoint.id)).access_control_list or []
        may = {
            line.group_name or line.user_name or line.service_principal_name for line in held if line.all_permissions
        }
        names = [name for name in names if name not in may]
    if not names:
        return []

    def make() -> None:
        with explained(f"let others ask {settings.endpoint!r}", right=MANAGE):
            found = workspace.serving_endpoints.get(settings.endpoint)
            workspace.serving_endpoints.update_permissions(
                str(found.id), access_control_list=[_grant(name) for name in names]
            )

    return [Change(f"let {', '.join(names)} ask it (CAN QUERY)", make)]


def _grant(name: str) -> ServingEndpointAccessControlRequest:
    """Tell a user (a mail address), a service principal (an application id) and a group by the form of the name."""
    is_id = re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", name)
    field = "user_name" if "@" in name else "service_principal_name" if is_id else "group_name"
    return ServingEndpointAccessControlRequest(
        permission_level=ServingEndpointPermissionLevel.CAN_QUERY, **{field: name}
    )


# Waiting


def _waited(
    workspace: WorkspaceClient, settings: DeploySettings, until: Callable[[ServingEndpointDetailed], bool]
) -> ServingEndpointDetailed:
    return ws.wait(
        workspace,
        settings.endpoint,
        until,
        poll_seconds=settings.poll_seconds,
        timeout_minutes=settings.timeout_minutes,
    )


def _serving(workspace: WorkspaceClient, settings: DeploySettings, goal: Goal) -> ServingEndpointDetailed:
    """Wait until the endpoint serves; say why where the update failed."""
    endpoint = _waited(workspace, settings, lambda now: ws.is_ready(now) or ws.has_failed(now))
    if ws.has_failed(endpoint):
        raise ScgptBatchError(_failure(workspace, settings.endpoint, endpoint, goal))
    return endpoint


def _failure(workspace: WorkspaceClient, name: str, endpoint: ServingEndpointDetailed, goal: Goal) -> str:
    tried = endpoint.pending_config or endpoint.config
    said = [
        f"{entity.name}: {entity.state.deployment_state_message}"
        for entity in (tried.served_entities if tried else None) or []
        if entity.state and entity.state.deployment_state_message
    ]
    log = ws.last_log_line(workspace, name, str(goal.entities[-1].name), build=True)
    on = ", ".join(f"version {line['version']} ({line['traffic']} %)" for line in ws.served(endpoint))
    parts = [
        f"endpoint {name!r}: the update to version {goal.version} of {goal.model} is {ws.state(endpoint)}",
        *said,
        f"last line of the build log: {log}" if log else "",
        f"{on} goes on serving" if on else "nothing is served",
        "mend it and run the same command again, or deploy another version",
    ]
    return "; ".join(part for part in parts if part)

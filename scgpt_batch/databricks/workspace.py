"""A Databricks workspace: how to reach it, how its endpoints are read and waited for, what its refusals mean."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import requests
from databricks.sdk import WorkspaceClient
from databricks.sdk.config import Config
from databricks.sdk.errors import DatabricksError, NotFound, PermissionDenied, Unauthenticated
from databricks.sdk.service.serving import (
    EndpointStateConfigUpdate,
    EndpointStateReady,
    ServedEntityOutput,
    ServingEndpointDetailed,
)

import scgpt_batch
from scgpt_batch.errors import ConfigError, ScgptBatchError

logger = logging.getLogger(__name__)

FAILED = (EndpointStateConfigUpdate.UPDATE_FAILED, EndpointStateConfigUpdate.UPDATE_CANCELED)
LOG_IN = "run `databricks auth login --host https://WORKSPACE`, or set DATABRICKS_HOST and what your way of login needs"
TELL_AGAIN_SECONDS = 60  # without a change of state


def connect(retry_seconds: int) -> WorkspaceClient:
    """Log in by Databricks' unified authentication (environment, profile, CLI, notebook).

    Raises
    ------
    ConfigError
        It finds no host or no credentials.
    """
    try:
        config = Config(
            retry_timeout_seconds=retry_seconds, product="scgpt_batch", product_version=scgpt_batch.__version__
        )
        return WorkspaceClient(config=config)
    except (ValueError, requests.RequestException) as exc:
        first = str(exc).splitlines()[0].split(". Config:")[0]
        raise ConfigError(f"no Databricks workspace to talk to: {first}; {LOG_IN}") from exc


@contextmanager
def explained(doing: str, *, right: str = "") -> Iterator[None]:
    """Say what the workspace refuses in one line: `doing` what, and the `right` that it takes.

    Raises
    ------
    ConfigError
        No login, or not the right to do it.
    ScgptBatchError
        Anything else that it refuses, or no answer for as long as it was asked again.
    """
    try:
        yield
    except Unauthenticated as exc:
        raise ConfigError(f"cannot {doing}: the workspace does not know these credentials ({exc}); {LOG_IN}") from exc
    except PermissionDenied as exc:
        needs = f"; it takes {right}" if right else ""
        raise ConfigError(f"cannot {doing}: permission denied ({_line(exc)}){needs}") from exc
    except DatabricksError as exc:
        raise ScgptBatchError(f"cannot {doing}: Databricks answers {_line(exc)}") from exc
    except (TimeoutError, requests.RequestException) as exc:
        why = _line(exc.__cause__ or exc)
        raise ScgptBatchError(f"cannot {doing}: no answer from the workspace ({why}); run it again later") from exc


def find_endpoint(workspace: WorkspaceClient, name: str) -> ServingEndpointDetailed | None:
    """Read an endpoint's state; None when there is no endpoint of that name."""
    try:
        with explained(f"read endpoint {name!r}", right="CAN VIEW on the endpoint"):
            return workspace.serving_endpoints.get(name)
    except ScgptBatchError as exc:
        if isinstance(exc.__cause__, NotFound):
            return None
        raise


def wait(
    workspace: WorkspaceClient,
    name: str,
    until: Callable[[ServingEndpointDetailed], bool],
    *,
    poll_seconds: float,
    timeout_minutes: float,
) -> ServingEndpointDetailed:
    """Look at an endpoint until it is as wanted; tell its state when it changes, and each minute.

    Raises
    ------
    ScgptBatchError
        It is not so within the time, or the endpoint was deleted meanwhile.
    """
    started, told, told_at = time.monotonic(), "", 0.0
    while True:
        endpoint = find_endpoint(workspace, name)
        if endpoint is None:
            raise ScgptBatchError(f"endpoint {name!r} was deleted by somebody while it was waited for")
        if until(endpoint):
            return endpoint
        passed = time.monotonic() - started
        if passed > timeout_minutes * 60:
            raise ScgptBatchError(
                f"endpoint {name!r} is still {state(endpoint)} after {timeout_minutes:g} min; the update goes on by "
                "itself: run the same command again to wait for it"
            )
        if (now := progress(endpoint)) != told or passed - told_at > TELL_AGAIN_SECONDS:
            logger.info("endpoint %s, %.0f s: %s", name, passed, now)
            told, told_at = now, passed
        time.sleep(poll_seconds)


def is_updating(endpoint: ServingEndpointDetailed) -> bool:
    """Tell whether an update is under way, so that no other may begin."""
    return endpoint.state is not None and endpoint.state.config_update is EndpointStateConfigUpdate.IN_PROGRESS


def has_failed(endpoint: ServingEndpointDetailed) -> bool:
    """Tell whether the last update failed or was cancelled; what was served before is served on."""
    return endpoint.state is not None and endpoint.state.config_update in FAILED


def is_ready(endpoint: ServingEndpointDetailed) -> bool:
    """Tell whether it serves what it was last told to serve (`ready` alone stays READY while versions are swapped)."""
    told = endpoint.state
    settled = told is not None and told.config_update is EndpointStateConfigUpdate.NOT_UPDATING
    return settled and told is not None and told.ready is EndpointStateReady.READY


def state(endpoint: ServingEndpointDetailed) -> str:
    """Say the state in one word: READY, NOT_READY, or what its update is doing."""
    if endpoint.state is None:
        return "NOT_READY"
    update, ready = endpoint.state.config_update, endpoint.state.ready
    if update is not None and update is not EndpointStateConfigUpdate.NOT_UPDATING:
        return update.value
    return ready.value if ready else "NOT_READY"


def progress(endpoint: ServingEndpointDetailed) -> str:
    """Say the state, and that of each version which is not ready."""
    waiting = endpoint.pending_config or endpoint.config
    entities = (waiting.served_entities if waiting else None) or []
    return ", ".join([state(endpoint), *(f"{e.name} {deployment(e)}" for e in entities)])


def deployment(entity: ServedEntityOutput) -> str:
    """Say how far a version's deployment is, and why where Databricks says so."""
    if entity.state is None or entity.state.deployment is None:
        return "unknown"
    message = entity.state.deployment_state_message
    return entity.state.deployment.value.removeprefix("DEPLOYMENT_").lower() + (f" ({message})" if message else "")


def served(endpoint: ServingEndpointDetailed) -> list[dict[str, Any]]:
    """List what an endpoint serves: name, model, version, percent of the traffic, compute and state of each."""
    shares = traffic(endpoint)
    return [_described(entity) | {"traffic": shares.get(entity.name or "", 0)} for entity in entities(endpoint)]


def pending(endpoint: ServingEndpointDetailed) -> list[dict[str, Any]]:
    """List what an update under way, or one that failed, wants to serve."""
    coming = endpoint.pending_config.served_entities if endpoint.pending_config else None
    return [_described(entity) for entity in coming or []]


def _described(entity: ServedEntityOutput) -> dict[str, Any]:
    kind = entity.workload_type.value if entity.workload_type else "CPU"
    return {
        "name": entity.name,
        "model": entity.entity_name,
        "version": entity.entity_version,
        "workload": f"{kind} {entity.workload_size or ''}".strip(),
        "state": deployment(entity),
    }


def gateway_table(endpoint: ServingEndpointDetailed | None) -> str | None:
    """Name the inference table that AI Gateway fills; None while it fills none."""
    config = endpoint.ai_gateway.inference_table_config if endpoint and endpoint.ai_gateway else None
    if config is None or not config.enabled:
        return None
    return f"{config.catalog_name}.{config.schema_name}.{config.table_name_prefix}_payload"


def entities(endpoint: ServingEndpointDetailed) -> list[ServedEntityOutput]:
    """Return what an endpoint serves now."""
    return (endpoint.config.served_entities if endpoint.config else None) or []


def traffic(endpoint: ServingEndpointDetailed) -> dict[str, int]:
    """Return the percent of the traffic by served entity; one alone has it all."""
    config = endpoint.config.traffic_config if endpoint.config else None
    routes = (config.routes if config else None) or []
    shares = {route.served_entity_name or route.served_model_name or "": route.traffic_percentage for route in routes}
    names = [entity.name or "" for entity in entities(endpoint)]
    return shares or ({names[0]: 100} if len(names) == 1 else {})


def last_log_line(workspace: WorkspaceClient, name: str, served_entity: str, *, build: bool) -> str:
    """Return the last line of a version's build log or of its server's; empty where there is none (yet)."""
    api = workspace.serving_endpoints
    try:
        told = (api.build_logs if build else api.logs)(name, served_entity).logs
    except DatabricksError as exc:  # no log before the container is built, and none once it is gone
        logger.info("no log of %s: %s", served_entity, _line(exc))
        return ""
    lines = [line.strip() for line in (told or "").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _line(exc: BaseException) -> str:
    code = getattr(exc, "error_code", None)
    told = " ".join(str(exc).split()) or type(exc).__name__
    return f"{code}: {told}" if code else told

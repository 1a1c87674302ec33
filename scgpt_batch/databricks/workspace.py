"""A Databricks workspace: log in, read endpoints and wait for them, explain errors."""

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
LOG_IN = (
    "run `databricks auth login --host https://WORKSPACE`, or set DATABRICKS_HOST and your login method's variables"
)
REPEAT_LOG_SECONDS = 60  # while the state does not change


def connect(retry_seconds: int) -> WorkspaceClient:
    """Log in by Databricks' unified authentication (environment, profile, CLI, notebook).

    Raises
    ------
    ConfigError
        No host or no credentials are configured.
    """
    try:
        config = Config(
            retry_timeout_seconds=retry_seconds, product="scgpt_batch", product_version=scgpt_batch.__version__
        )
        return WorkspaceClient(config=config)
    except (ValueError, requests.RequestException) as exc:
        first = _without_config(exc)
        raise ConfigError(f"cannot log in to a Databricks workspace: {first}; {LOG_IN}") from exc


@contextmanager
def explained(action: str, *, permission: str = "") -> Iterator[None]:
    """Raise errors of the workspace as one line: the `action` that failed, and the `permission` that it needs.

    Raises
    ------
    ConfigError
        The credentials or the permission are missing.
    ScgptBatchError
        Any other error, or no response within the SDK's retries.
    """
    try:
        yield
    except Unauthenticated as exc:
        raise ConfigError(f"cannot {action}: the workspace rejects these credentials ({exc}); {LOG_IN}") from exc
    except PermissionDenied as exc:
        if "access token" in str(exc).lower():  # expired or revoked; only some login methods get 401
            said = _without_config(exc)
            raise ConfigError(f"cannot {action}: the workspace rejects the access token ({said}); {LOG_IN}") from exc
        needs = f"; it needs {permission}" if permission else ""
        raise ConfigError(f"cannot {action}: permission denied ({_line(exc)}){needs}") from exc
    except DatabricksError as exc:
        raise ScgptBatchError(f"cannot {action}: Databricks returned {_line(exc)}") from exc
    except (TimeoutError, requests.RequestException) as exc:
        why = _line(exc.__cause__ or exc)
        raise ScgptBatchError(f"cannot {action}: no response from the workspace ({why}); run it again later") from exc


def find_endpoint(workspace: WorkspaceClient, name: str) -> ServingEndpointDetailed | None:
    """Return an endpoint's state; None if no endpoint has that name."""
    try:
        with explained(f"read endpoint {name!r}", permission="CAN VIEW on the endpoint"):
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
    """Poll an endpoint until `until` holds; log its state on each change, and once a minute.

    Raises
    ------
    ScgptBatchError
        The time is over, or the endpoint was deleted meanwhile.
    """
    started, logged, logged_at = time.monotonic(), "", 0.0
    while True:
        endpoint = find_endpoint(workspace, name)
        if endpoint is None:
            raise ScgptBatchError(f"endpoint {name!r} was deleted while this command waited for it; run it again")
        if until(endpoint):
            return endpoint
        passed = time.monotonic() - started
        if passed > timeout_minutes * 60:
            raise ScgptBatchError(
                f"endpoint {name!r} is still {state(endpoint)} after {timeout_minutes:g} min; the update continues: "
                "run the same command again to wait for it"
            )
        if (now := progress(endpoint)) != logged or passed - logged_at > REPEAT_LOG_SECONDS:
            logger.info("endpoint %s, %.0f s: %s", name, passed, now)
            logged, logged_at = now, passed
        time.sleep(poll_seconds)


def is_updating(endpoint: ServingEndpointDetailed) -> bool:
    """Return whether an update is in progress; Databricks accepts no other one meanwhile."""
    return endpoint.state is not None and endpoint.state.config_update is EndpointStateConfigUpdate.IN_PROGRESS


def has_failed(endpoint: ServingEndpointDetailed) -> bool:
    """Return whether the last update failed or was cancelled; the endpoint then serves what it served before."""
    return endpoint.state is not None and endpoint.state.config_update in FAILED


def is_ready(endpoint: ServingEndpointDetailed) -> bool:
    """Return whether it serves its last configuration (`ready` alone stays READY while versions are swapped)."""
    current = endpoint.state
    if current is None or current.config_update is not EndpointStateConfigUpdate.NOT_UPDATING:
        return False
    return current.ready is EndpointStateReady.READY


def state(endpoint: ServingEndpointDetailed) -> str:
    """Return the state in one word: READY, NOT_READY, or that of the update."""
    if endpoint.state is None:
        return "NOT_READY"
    update, ready = endpoint.state.config_update, endpoint.state.ready
    if update is not None and update is not EndpointStateConfigUpdate.NOT_UPDATING:
        return update.value
    return ready.value if ready else "NOT_READY"


def progress(endpoint: ServingEndpointDetailed) -> str:
    """Return the state, and that of each version in the coming configuration."""
    coming = endpoint.pending_config or endpoint.config
    entities = (coming.served_entities if coming else None) or []
    return ", ".join([state(endpoint), *(f"{e.name} {deployment(e)}" for e in entities)])


def deployment(entity: ServedEntityOutput) -> str:
    """Return the state of a version's deployment, with Databricks' reason if it gives one."""
    if entity.state is None or entity.state.deployment is None:
        return "unknown"
    message = entity.state.deployment_state_message
    return entity.state.deployment.value.removeprefix("DEPLOYMENT_").lower() + (f" ({message})" if message else "")


def served(endpoint: ServingEndpointDetailed) -> list[dict[str, Any]]:
    """List the versions that an endpoint serves: name, model, version, percent of the traffic, compute and state."""
    shares = traffic(endpoint)
    return [_described(entity) | {"traffic": shares.get(entity.name or "", 0)} for entity in entities(endpoint)]


def pending(endpoint: ServingEndpointDetailed) -> list[dict[str, Any]]:
    """List the versions of an update that is in progress or failed."""
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
    """Return the name of the inference table that AI Gateway writes; None if logging is off."""
    config = endpoint.ai_gateway.inference_table_config if endpoint and endpoint.ai_gateway else None
    if config is None or not config.enabled:
        return None
    return f"{config.catalog_name}.{config.schema_name}.{config.table_name_prefix}_payload"


def entities(endpoint: ServingEndpointDetailed) -> list[ServedEntityOutput]:
    """Return the served entities of an endpoint's current configuration."""
    return (endpoint.config.served_entities if endpoint.config else None) or []


def traffic(endpoint: ServingEndpointDetailed) -> dict[str, int]:
    """Return the percent of the traffic by served entity; a single entity gets 100."""
    config = endpoint.config.traffic_config if endpoint.config else None
    routes = (config.routes if config else None) or []
    shares = {route.served_entity_name or route.served_model_name or "": route.traffic_percentage for route in routes}
    names = [entity.name or "" for entity in entities(endpoint)]
    return shares or ({names[0]: 100} if len(names) == 1 else {})


def log_lines(workspace: WorkspaceClient, name: str, served_entity: str, *, build: bool) -> list[str]:
    """Return the lines of a version's build log or server log that are not blank; none if there is no log yet."""
    api = workspace.serving_endpoints
    try:
        log = (api.build_logs if build else api.logs)(name, served_entity).logs
    except DatabricksError as exc:  # there is no log before the container is built, nor after it is removed
        logger.info("no log of %s: %s", served_entity, _line(exc))
        return []
    return [line.strip() for line in (log or "").splitlines() if line.strip()]


def _without_config(exc: Exception) -> str:
    """Return the first line of an error of the SDK, without the configuration that it appends."""
    return str(exc).splitlines()[0].split(". Config:")[0]


def _line(exc: BaseException) -> str:
    code = getattr(exc, "error_code", None)
    message = " ".join(str(exc).split()) or type(exc).__name__
    return f"{code}: {message}" if code else message

"""A simulated Databricks workspace: the REST API of serving endpoints, and the parts of Unity Catalog that they need.

It keeps state, takes its time for updates, and refuses a body that the SDK's own classes do not give back as it came.
"""

import inspect
import json
import os
import re
import sys
import threading
import traceback
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

import numpy as np
import pytest
from databricks.sdk.service import serving, vectorsearch
from pyspark.errors import AnalysisException

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
API = serving.ServingEndpointsAPI
SEARCH = vectorsearch.VectorSearchIndexesAPI
RowResult = Callable[[dict[str, Any], tuple[list[str], dict[str, Any]]], dict[str, Any]]


class Refused(Exception):
    """An error response of the workspace."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


@dataclass
class Fault:
    """An error to return `times` times; with `after`, the request has been processed, and its response is lost."""

    method: str
    path: str  # regular expression
    status: int
    code: str
    message: str = "injected"
    times: int = 1
    after: bool = False
    retry_after: int = 0  # seconds that the response asks the client to wait


@dataclass
class Workspace:
    """The state of the workspace, which tests read and change."""

    # name -> {"versions": {...}, "aliases": {...}, "tags": {version: {...}}, "deployment_job_id": ...}
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    query: dict[str, str] = field(default_factory=dict)  # of the request that is being answered
    tables: set[str] = field(default_factory=set)
    schemas: set[str] = field(default_factory=set)
    lacking: set[str] = field(default_factory=set)  # rights in Unity Catalog that the principal does not have
    endpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    permissions: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    indexes: dict[str, int] = field(default_factory=dict)  # name -> polls until it is ready
    syncs: list[str] = field(default_factory=list)  # indexes whose sync was started
    indexed: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # name -> rows of an index
    polls: int = 2  # how often an update is seen under way before it is done
    failing: set[str] = field(default_factory=set)  # versions that cannot be deployed
    faults: list[Fault] = field(default_factory=list)
    server_log: str = "INFO model opened on cuda"  # its end
    predict: RowResult | None = None
    requests: list[tuple[str, str, Any]] = field(default_factory=list)  # method, path, body
    user: str = "0a1b2c3d-0000-4000-8000-000000000001"  # who is logged in: a service principal's application id
    token: str = "secret"
    expires_after: int | None = None  # requests until the token expires; None: it does not
    url: str = ""

    def add_model(self, name: str, *versions: int, **aliases: int) -> None:
        """Register versions of a model, and set aliases."""
        model = self.models.setdefault(name, {"versions": {}, "aliases": {}})
        model["versions"] |= {str(v): "READY" for v in versions}
        model["aliases"] |= aliases

    def sql(self) -> "SqlSession":
        """Return a Spark session of the principal."""
        return SqlSession(self)

    @property
    def changes(self) -> list[tuple[str, str]]:
        """The requests that can change something, without queries of a model."""
        return [(m, p) for m, p, _ in self.requests if m != "GET" and not p.endswith("/invocations")]

    def last_body(self, method: str, ending: str) -> Any:
        """Return the body of the last request with this method and end of path."""
        return next(b for m, p, b in reversed(self.requests) if m == method and p.endswith(ending))

    # Requests

    def log_in(self, header: str | None) -> None:
        """Reject a request without the token, or with an expired one."""
        if header != f"Bearer {self.token}":
            raise Refused(401, "UNAUTHENTICATED", "Credential was not sent or was of an unsupported type")
        if self.expires_after is not None:
            if self.expires_after == 0:
                raise Refused(403, "PERMISSION_DENIED", "Invalid access token.")
            self.expires_after -= 1

    def answer(self, method: str, path: str, body: Any) -> Any:
        self.requests.append((method, path, body))
        fault = next((f for f in self.faults if f.method == method and f.times and re.search(f.path, path)), None)
        if fault:
            fault.times -= 1
            if fault.after:
                self._route(method, path, body)
            raise Refused(fault.status, fault.code, fault.message, {"Retry-After": str(fault.retry_after)})
        return self._route(method, path, body)

    def _route(self, method: str, path: str, body: Any) -> Any:
        for wanted, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and wanted == method:
                return handler(self, *map(unquote, match.groups()), *([] if method == "GET" else [body]))
        raise Refused(404, "ENDPOINT_NOT_FOUND", f"no API for {method} {path}")

    def known(self, _: Any = None) -> dict:
        return {}

    def me(self) -> dict:
        return {"id": "1", "userName": self.user}

    def get_version(self, name: str, version: str) -> dict:
        status = self.models.get(name, {"versions": {}})["versions"].get(version)
        if status is None:
            raise Refused(404, "RESOURCE_DOES_NOT_EXIST", f"Model Version '{name}' version {version} does not exist.")
        return {"model_name": name, "version": int(version), "status": status}

    def get_alias(self, name: str, alias: str) -> dict:
        found = self.models.get(name, {"aliases": {}})["aliases"].get(alias)
        if found is None:
            raise Refused(404, "RESOURCE_DOES_NOT_EXIST", f"Alias '{alias}' of '{name}' does not exist.")
        return self.get_version(name, str(found))

    def table_exists(self, name: str) -> dict:
        return {"table_exists": name in self.tables}

    def create(self, body: dict) -> dict:
        check(API.create, body)
        name = body["name"]
        if not NAME.fullmatch(name):
            raise Refused(400, "INVALID_PARAMETER_VALUE", f"Invalid endpoint name {name!r}")
        if name in self.endpoints:
            raise Refused(409, "RESOURCE_ALREADY_EXISTS", f"Endpoint with name '{name}' already exists.")
        config = self._checked(body["config"])
        endpoint = {"name": name, "id": f"id-of-{name}", "creator": "me@lab.org", "tags": body.get("tags", []),
                    "permission_level": "CAN_MANAGE", "state": {"ready": "NOT_READY"}}  # fmt: skip
        if "ai_gateway" in body:
            self._set_gateway(endpoint, body["ai_gateway"])
        self.endpoints[name] = endpoint
        self._begin(endpoint, config)
        return self._shown(endpoint)

    def get(self, name: str) -> dict:
        endpoint = self._endpoint(name)
        if "left" in endpoint:
            endpoint["left"] -= 1
            if endpoint["left"] <= 0:
                self._finish(endpoint)
        return self._shown(endpoint)

    def update_config(self, name: str, body: dict) -> dict:
        check(API.update_config, body, path={"name": name})
        endpoint = self._endpoint(name)
        if endpoint["state"]["config_update"] == "IN_PROGRESS":
            raise Refused(409, "RESOURCE_CONFLICT", f"Endpoint '{name}' is being updated")
        capture = body.get("auto_capture_config") or {}
        if capture.get("enabled"):
            raise Refused(400, "INVALID_PARAMETER_VALUE", "Legacy inference tables can no longer be enabled.")
        config = self._checked(body)
        old = endpoint.get("config", {}).get("auto_capture_config")
        if old:
            config["auto_capture_config"] = old | {"enabled": capture.get("enabled", old["enabled"])}
        self._begin(endpoint, config)
        return self._shown(endpoint)

    def put_gateway(self, name: str, body: dict) -> dict:
        check(API.put_ai_gateway, body, path={"name": name})
        self._set_gateway(self._endpoint(name), body)
        return body

    def patch_tags(self, name: str, body: dict) -> dict:
        check(API.patch, body, path={"name": name})
        endpoint = self._endpoint(name)
        gone = {tag["key"] for tag in body.get("add_tags", [])} | set(body.get("delete_tags", []))
        endpoint["tags"] = [t for t in endpoint["tags"] if t["key"] not in gone] + body.get("add_tags", [])
        return {"tags": endpoint["tags"]}

    def get_permissions(self, endpoint_id: str) -> dict:
        return {"object_id": endpoint_id, "access_control_list": self.permissions.get(endpoint_id, [])}

    def patch_permissions(self, endpoint_id: str, body: dict) -> dict:
        check(API.update_permissions, body, path={"serving_endpoint_id": endpoint_id})
        if endpoint_id not in {endpoint["id"] for endpoint in self.endpoints.values()}:
            raise Refused(404, "RESOURCE_DOES_NOT_EXIST", f"no endpoint with id {endpoint_id}")
        entries = self.permissions.setdefault(endpoint_id, [])
        for line in body["access_control_list"]:
            level = {"permission_level": line.pop("permission_level"), "inherited": False}
            entries.append(line | {"all_permissions": [level]})
        return self.get_permissions(endpoint_id)

    def build_logs(self, name: str, entity: str) -> dict:
        endpoint = self._endpoint(name)
        configs = [endpoint[key] for key in ("config", "pending_config") if key in endpoint]
        if entity not in [served["name"] for config in configs for served in config["served_entities"]]:
            raise Refused(404, "RESOURCE_DOES_NOT_EXIST", f"no served model {entity}")
        failed = entity.rsplit("-", 1)[-1] in self.failing
        ends = "ERROR: no matching distribution for torch==0.0" if failed else "#2 done"
        return {"logs": f"#1 building\n{ends}\n"}

    def server_logs(self, name: str, entity: str) -> dict:
        self.build_logs(name, entity)
        return {"logs": f"INFO {entity} loads the model\n{self.server_log}\n"}

    def metrics(self, name: str) -> bytes:
        self._endpoint(name)
        return METRICS.encode()

    def invoke(self, name: str, body: dict) -> Any:
        endpoint = self._endpoint(name)
        if endpoint["state"]["ready"] != "READY":
            raise Refused(400, "BAD_REQUEST", f"endpoint {name} is not ready")
        assert self.predict is not None
        return self.predict(body)

    # What MLflow sends to its registry "databricks-uc"

    def create_registered_model(self, body: dict) -> dict:
        self._require("CREATE MODEL", f"Schema '{body['name'].rpartition('.')[0]}'")
        if body["name"] in self.models:
            message = f"Registered model '{body['name']}' already exists."
            raise Refused(409, "RESOURCE_ALREADY_EXISTS", message)
        self.models[body["name"]] = {"versions": {}, "aliases": {}, "deployment_job_id": body.get("deployment_job_id")}
        return self._registered_model(body["name"])

    def update_registered_model(self, body: dict) -> dict:
        found = self._registered_model(body["name"])
        self.models[body["name"]] |= {"deployment_job_id": body.get("deployment_job_id")}
        return found | self._registered_model(body["name"])

    def get_registered_model(self) -> dict:
        return self._registered_model(self.query["name"])

    def get_model_version(self) -> dict:
        name, version = self.query["name"], self.query["version"]
        found = self.get_version(name, version)
        tags = self.models[name].get("tags", {}).get(version, {})
        shown = [{"key": key, "value": value} for key, value in tags.items()]
        return {"model_version": {"name": name, "version": version, "status": found["status"], "tags": shown}}

    def create_model_version(self, body: dict) -> dict:
        self._registered_model(body["name"])
        self._require("CREATE MODEL VERSION", f"Model '{body['name']}'")
        raise Refused(501, "NOT_IMPLEMENTED", "this stand-in stores no files")

    def _require(self, right: str, where: str) -> None:
        """Deny a request that needs a right that the principal lacks."""
        if right in self.lacking:
            raise Refused(403, "PERMISSION_DENIED", f"User does not have {right} on {where}.")

    def _registered_model(self, name: str) -> dict:
        if name not in self.models:
            raise Refused(404, "RESOURCE_DOES_NOT_EXIST", f"Registered model '{name}' does not exist.")
        job = self.models[name].get("deployment_job_id")
        return {"registered_model": {"name": name} | ({"deployment_job_id": job} if job else {})}

    def get_index(self, name: str) -> dict:
        if name not in self.indexes:
            raise Refused(404, "RESOURCE_DOES_NOT_EXIST", f"Vector index {name} does not exist.")
        self.indexes[name] = max(0, self.indexes[name] - 1)
        ready = not self.indexes[name]
        status = {"ready": ready, "indexed_row_count": 9, "message": "Index is ready" if ready else "Initializing"}
        return {"name": name, "primary_key": "embedding_id", "index_type": "DELTA_SYNC", "status": status}

    def sync_index(self, name: str, body: Any) -> dict:
        if not self.get_index(name)["status"]["ready"]:
            raise Refused(400, "BAD_REQUEST", f"Index {name} is not ready to sync yet.")
        self.syncs.append(name)
        return {}

    def query_index(self, name: str, body: dict) -> dict:
        check(SEARCH.query_index, body, path={"index_name": name})
        self.get_index(name)
        rows, columns = self.indexed[name], body["columns"]
        squares = [float(np.square(np.subtract(row["embedding"], body["query_vector"])).sum()) for row in rows]
        nearest = np.argsort(squares, kind="stable")[: body["num_results"]]
        found = [[*(rows[i][column] for column in columns), 1 / (1 + squares[i])] for i in nearest]
        names = [{"name": column} for column in [*columns, "score"]]
        return {
            "manifest": {"column_count": len(names), "columns": names},
            "result": {"row_count": len(found), "data_array": found},
        }

    # State

    def _endpoint(self, name: str) -> dict[str, Any]:
        if name not in self.endpoints:
            raise Refused(404, "RESOURCE_DOES_NOT_EXIST", f"Endpoint with name '{name}' does not exist.")
        return self.endpoints[name]

    def _shown(self, endpoint: dict[str, Any]) -> dict[str, Any]:
        return {key: deepcopy(value) for key, value in endpoint.items() if key != "left"}

    def _checked(self, config: dict[str, Any]) -> dict[str, Any]:
        """Reject what the service rejects; return the config in its format."""
        entities = config.get("served_entities") or []
        names = []
        for entity in entities:
            version = entity.get("entity_version", "")
            if not version.isdigit():
                raise Refused(400, "INVALID_PARAMETER_VALUE", f"entity_version must be a number, got {version!r}")
            self.get_version(entity["entity_name"], version)
            if bool(entity.get("workload_size")) == ("max_provisioned_concurrency" in entity):
                raise Refused(400, "INVALID_PARAMETER_VALUE", "give workload_size or provisioned concurrency")
            if entity.get("workload_size", "Small") not in ("Small", "Medium", "Large"):
                raise Refused(400, "INVALID_PARAMETER_VALUE", f"Invalid workload size {entity['workload_size']!r}")
            names.append(entity.get("name") or f"{entity['entity_name']}-{version}")
        if not entities or not all(map(NAME.fullmatch, names)) or len(set(names)) < len(names):
            raise Refused(400, "INVALID_PARAMETER_VALUE", f"Invalid served entity names {names}")
        routes = (config.get("traffic_config") or {}).get("routes") or [
            {"served_entity_name": names[0], "traffic_percentage": 100}
        ]
        shares = {route["served_entity_name"]: route["traffic_percentage"] for route in routes}
        if sum(shares.values()) != 100 or set(shares) != set(names):
            raise Refused(400, "INVALID_PARAMETER_VALUE", f"Invalid traffic {shares} for {names}")
        shown = [entity | {"name": name, "creator": "me@lab.org", "creation_timestamp": 1}
                 for entity, name in zip(entities, names, strict=True)]  # fmt: skip
        return {"served_entities": shown, "traffic_config": {"routes": routes}}

    def _set_gateway(self, endpoint: dict[str, Any], gateway: dict[str, Any]) -> None:
        new, old = gateway.get("inference_table_config"), endpoint.get("ai_gateway", {}).get("inference_table_config")
        if new and new["enabled"]:
            if endpoint.get("config", {}).get("auto_capture_config", {}).get("enabled"):
                raise Refused(400, "INVALID_PARAMETER_VALUE", "Disable the legacy inference table first.")
            if old and old["enabled"] and new != old:
                raise Refused(400, "INVALID_PARAMETER_VALUE", "Disable the inference table before changing its name.")
            table = f"{new['catalog_name']}.{new['schema_name']}.{new['table_name_prefix']}_payload"
            if table in self.tables and new != old:
                raise Refused(400, "INVALID_PARAMETER_VALUE", f"Table {table} already exists.")
            self.tables.add(table)
        endpoint["ai_gateway"] = gateway

    def _begin(self, endpoint: dict[str, Any], config: dict[str, Any]) -> None:
        for entity in config["served_entities"]:
            entity["state"] = deployment("CREATING", "Creating container")
        endpoint["pending_config"], endpoint["left"] = config, self.polls
        endpoint["state"]["config_update"] = "IN_PROGRESS"

    def _finish(self, endpoint: dict[str, Any]) -> None:
        del endpoint["left"]
        pending = endpoint["pending_config"]
        for entity in pending["served_entities"]:
            if entity["entity_version"] in self.failing:
                entity["state"] = {
                    "deployment": "DEPLOYMENT_FAILED",
                    "deployment_state_message": "Container build failed",
                }
                endpoint["state"]["config_update"] = "UPDATE_FAILED"
        if endpoint["state"]["config_update"] == "IN_PROGRESS":
            for entity in pending["served_entities"]:
                entity["state"] = deployment("READY", "")
            endpoint["config"] = endpoint.pop("pending_config")
            endpoint["state"] = {"ready": "READY", "config_update": "NOT_UPDATING"}


def deployment(state: str, message: str) -> dict[str, str]:
    return {"deployment": f"DEPLOYMENT_{state}", "deployment_state_message": message}


METRICS = """\
# HELP request_count_total Requests
# TYPE request_count_total counter
request_count_total{endpoint_name="scgpt",served_model_name="scgpt-3"} 120
request_4xx_count_total{endpoint_name="scgpt",served_model_name="scgpt-3"} 3
# TYPE request_latency_ms histogram
request_latency_ms_bucket{served_model_name="scgpt-3",le="100"} 80
request_latency_ms_bucket{served_model_name="scgpt-3",le="+Inf"} 120
request_latency_ms_sum{served_model_name="scgpt-3"} 15600
request_latency_ms_count{served_model_name="scgpt-3"} 120
# TYPE gpu_usage_percentage gauge
gpu_usage_percentage{served_model_name="scgpt-3"} 41.5
"""

MLFLOW = "/api/2.0/mlflow/unity-catalog"
E20 = "/api/2.0/serving-endpoints"
ROUTES = [
    ("GET", r"/\.well-known/databricks-config", Workspace.known),
    ("GET", r"/api/2.0/(?:preview/)?scim/v2/Me", Workspace.me),
    ("GET", r"/api/2.1/unity-catalog/models/([^/]+)/aliases/([^/]+)", Workspace.get_alias),
    ("GET", r"/api/2.1/unity-catalog/models/([^/]+)/versions/([^/]+)", Workspace.get_version),
    ("GET", r"/api/2.1/unity-catalog/tables/([^/]+)/exists", Workspace.table_exists),
    ("POST", rf"{E20}/?", Workspace.create),
    ("GET", rf"{E20}/([^/]+)", Workspace.get),
    ("PUT", rf"{E20}/([^/]+)/config", Workspace.update_config),
    ("PUT", rf"{E20}/([^/]+)/ai-gateway", Workspace.put_gateway),
    ("PATCH", rf"{E20}/([^/]+)/tags", Workspace.patch_tags),
    ("GET", rf"{E20}/([^/]+)/served-models/([^/]+)/build-logs", Workspace.build_logs),
    ("GET", rf"{E20}/([^/]+)/served-models/([^/]+)/logs", Workspace.server_logs),
    ("GET", rf"{E20}/([^/]+)/metrics", Workspace.metrics),
    ("GET", r"/api/2.0/permissions/serving-endpoints/([^/]+)", Workspace.get_permissions),
    ("PATCH", r"/api/2.0/permissions/serving-endpoints/([^/]+)", Workspace.patch_permissions),
    ("POST", r"/serving-endpoints/([^/]+)/invocations", Workspace.invoke),
    ("POST", rf"{MLFLOW}/registered-models/create", Workspace.create_registered_model),
    ("PATCH", rf"{MLFLOW}/registered-models/update", Workspace.update_registered_model),
    ("GET", rf"{MLFLOW}/registered-models/get", Workspace.get_registered_model),
    ("POST", rf"{MLFLOW}/model-versions/create", Workspace.create_model_version),
    ("GET", rf"{MLFLOW}/model-versions/get", Workspace.get_model_version),
    ("GET", r"/api/2.0/vector-search/indexes/([^/]+)", Workspace.get_index),
    ("POST", r"/api/2.0/vector-search/indexes/([^/]+)/sync", Workspace.sync_index),
    ("POST", r"/api/2.0/vector-search/indexes/([^/]+)/query", Workspace.query_index),
]


class SqlSession:
    """A Spark session of the workspace's principal, as far as the creation of tables needs one."""

    catalog = property(lambda self: self)

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.statements = workspace, list[str]()

    def tableExists(self, name: str) -> bool:
        return name in self.workspace.tables

    def currentCatalog(self) -> str:
        return "main"

    def databaseExists(self, name: str) -> bool:
        return name in self.workspace.schemas

    def sql(self, statement: str) -> "SqlSession":
        """Create a schema or table, or tag one, if the principal may; the right counts before `IF NOT EXISTS`."""
        self.statements.append(statement)
        match = re.match(
            r"(CREATE SCHEMA|CREATE TABLE) IF NOT EXISTS ([\w.]+)|ALTER TABLE ([\w.]+) SET TAGS", statement
        )
        if match is None:
            raise AnalysisException("[TABLE_OR_VIEW_NOT_FOUND] The table or view cannot be found. SQLSTATE: 42P01")
        right, name = match[1] or "APPLY TAG", match[2] or match[3]
        if right in self.workspace.lacking:
            where = name if right == "APPLY TAG" else name.rpartition(".")[0]
            raise AnalysisException(
                f"[INSUFFICIENT_PERMISSIONS] Insufficient privileges: User does not have {right} on '{where}'. "
                "SQLSTATE: 42501"
            )
        if match[1]:
            (self.workspace.schemas if right == "CREATE SCHEMA" else self.workspace.tables).add(name)
        return self


def check(method: Callable, body: dict[str, Any], path: dict[str, str] | None = None) -> None:
    """Reject a body whose keys are not arguments of the SDK's method, or whose values its classes do not round-trip."""
    hints = typing.get_type_hints(method, vars(sys.modules[method.__module__]))
    for key, value in body.items():
        if key not in inspect.signature(method).parameters or key == "self" or key in (path or {}):
            raise Refused(400, "MALFORMED_REQUEST", f"unknown field {key!r}")
        if (back := returned(hints[key], value)) != value:
            raise Refused(400, "MALFORMED_REQUEST", f"{key}: {json.dumps(value)} is read as {json.dumps(back)}")


def returned(hint: Any, value: Any) -> Any:
    """Return a value parsed as a type of the SDK and serialized again."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if typing.get_origin(hint) is list:
        return [returned(kinds[0], item) for item in value]
    if kinds:
        return returned(kinds[0], value)
    if is_dataclass(hint):
        return hint.from_dict(value).as_dict()
    return hint(value).value if issubclass(hint, Enum) else hint(value)


@contextmanager
def served(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Workspace]:
    """Serve a workspace whose credentials the environment has; `home` has no profile of the machine's user."""
    server = serve(workspace)
    for name in list(os.environ):
        if name.startswith("DATABRICKS_"):
            monkeypatch.delenv(name)
    for name, value in {
        "HOME": str(home),
        "DATABRICKS_HOST": workspace.url,
        "DATABRICKS_TOKEN": workspace.token,
    }.items():
        monkeypatch.setenv(name, value)
    yield workspace
    server.shutdown()
    server.server_close()


def serve(workspace: Workspace) -> ThreadingHTTPServer:
    """Serve on a free port of 127.0.0.1 until `shutdown`."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body, status, headers = self.rfile.read(length), 200, {}
            try:
                path, _, query = self.path.partition("?")
                with lock:
                    workspace.query = dict(parse_qsl(query))
                    if "well-known" not in path:
                        workspace.log_in(self.headers.get("Authorization"))
                    answer = workspace.answer(self.command, path, json.loads(body) if body else None)
            except Refused as exc:
                status, headers = exc.status, exc.headers
                answer = {"error_code": exc.code, "message": str(exc)}
            except Exception:  # a fault of this stand-in: the test shall fail with it, and not wait for an answer
                status, answer = 500, {"error_code": "STAND_IN", "message": traceback.format_exc()}
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in (
                {"Content-Type": "application/json", "Content-Length": str(len(content))} | headers
            ).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    workspace.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server

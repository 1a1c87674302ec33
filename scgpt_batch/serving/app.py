"""The local endpoint: the routes of MLflow's scoring server, with logged requests and errors reported by cause.

MLflow's own /invocations returns status 400 and a traceback for every failure, and writes its JSON through pandas. This
one accepts the same requests, has MLflow check them against the model's signature, and responds in the same format.
"""

import asyncio
import hmac
import ipaddress
import logging
import math
import os
import signal
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import mlflow
import orjson
import uvicorn
from fastapi import FastAPI
from mlflow.pyfunc import PyFuncModel
from prometheus_client import CONTENT_TYPE_LATEST, Counter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from scgpt_batch.command_result import CommandResult, plural
from scgpt_batch.errors import CheckpointError, ConfigError, NonFiniteOutput, RequestRefused, WorkerCrash
from scgpt_batch.inference.engine import Embedder, RowResult
from scgpt_batch.models.device import gpu_problem
from scgpt_batch.parameters import Parameters
from scgpt_batch.registry.resolve import ResolvedModel, resolve
from scgpt_batch.registry.signature import answer_columns
from scgpt_batch.serving.connections import (
    HEADER_BYTES,
    ConnectionLimits,
    connections_within_files,
    limited_protocol,
)
from scgpt_batch.serving.inference_log import Exchange, InferenceLog
from scgpt_batch.serving.isolation import IsolatedReader
from scgpt_batch.serving.metrics import Metrics
from scgpt_batch.serving.microbatch import MicroBatcher, Rows
from scgpt_batch.serving.request import LESS, ParsedRequest, RequestedRow, RequestReader, inflate, too_large
from scgpt_batch.settings import ServeSettings

logger = logging.getLogger(__name__)

TOKEN = "SCGPT_BATCH_TOKEN"
HEALTH_ROUTES = ("/ping", "/health")  # need no token
JSON = "application/json"
CLIENT_CLOSED_REQUEST = 499  # nginx's code for a client that disconnected before the response
UNAUTHORIZED_LOG_SECONDS = 60.0  # between two log lines on requests without a valid token
THREADS = max(2, os.cpu_count() or 2)


@dataclass(frozen=True, kw_only=True)
class ServeResult(CommandResult):
    """What an endpoint answered until it was stopped."""

    model_uri: str
    requests: int
    logged: int

    def lines(self) -> list[str]:
        """Count the requests."""
        return [f"{self.model_uri}: {plural(self.requests, 'request')}, {self.logged:,} in the inference table"]


def serve(settings: ServeSettings) -> ServeResult:
    """Serve a registered model until SIGTERM or SIGINT; requests in progress are answered and logged first.

    Raises
    ------
    ConfigError
        The model does not exist, the port is in use, or the inference table cannot be used.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.umask(0o077)  # only this user may read the requests and responses in spool and table
    metrics = Metrics()
    with (
        suppress(KeyboardInterrupt),
        _listen(settings.host, settings.port, allow_without_token=settings.allow_without_token) as listener,
    ):
        model = resolve(settings.model_uri)
        loaded = mlflow.pyfunc.load_model(str(model.folder))
        endpoint = Endpoint(loaded, settings, metrics, served_entity=f"{model.name}-{model.version}")
        with _log(settings, metrics) or nullcontext() as log:
            endpoint.log = log
            _run(endpoint, listener, model, settings)
    return ServeResult(model_uri=settings.model_uri, **metrics.totals())


def _run(endpoint: "Endpoint", listener: socket.socket, model: ResolvedModel, settings: ServeSettings) -> None:
    """Run uvicorn on the socket. After its graceful stop, uvicorn raises the signal again (as KeyboardInterrupt)."""
    limits = ConnectionLimits(connections_within_files(settings.max_connections), settings.header_seconds)
    if limits.connections < settings.max_connections:
        logger.warning(
            "accepting at most %d connections: the limit of open files allows no more; raise it (ulimit -n)",
            limits.connections,
        )
    config = uvicorn.Config(
        endpoint.app(os.environ.get(TOKEN, "")), log_level="error", access_log=False, server_header=False,
        http=limited_protocol(limits, lambda limit: endpoint.metrics.refused_connections.labels(limit).inc()),
        ws="none", h11_max_incomplete_event_size=HEADER_BYTES, proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds), backlog=2048,
    )  # fmt: skip
    host, port = listener.getsockname()[:2]
    logger.info("serving %s at http://%s:%d/invocations", model.uri, host, port)
    uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int, *, allow_without_token: bool) -> socket.socket:
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as exc:
        raise ConfigError(f"cannot listen on {host}:{port}: {exc}; use another --port") from exc
    address = ipaddress.ip_address(listener.getsockname()[0])
    if not address.is_loopback and not os.environ.get(TOKEN) and not allow_without_token:
        listener.close()
        raise ConfigError(
            f"--host {host} is open to the network, but no token is set: set {TOKEN}, or use --allow-without-token if "
            "a proxy or firewall restricts access"
        )
    return listener


def _log(settings: ServeSettings, metrics: Metrics) -> InferenceLog | None:
    if settings.inference_table in ("", "none"):
        return None
    return InferenceLog(settings.inference_table, settings.spool, flush_seconds=settings.flush_seconds, metrics=metrics)


@dataclass
class _Call:
    """What is known about a request so far, for the log."""

    request_id: str
    at: datetime
    began: float  # monotonic time at which the whole body had arrived
    requester: str | None
    received: int = 0  # bytes of its body
    over: bool = False  # the client no longer waits for a response
    body: bytes | None = None  # decompressed; None if it is too large or not valid gzip
    client_request_id: str | None = None


class Endpoint:
    """Answers requests for one loaded model."""

    def __init__(self, model: PyFuncModel, settings: ServeSettings, metrics: Metrics, *, served_entity: str) -> None:
        """Load the weights for static mode in advance, so that the first request does not wait for them."""
        self._settings, self.metrics = settings, metrics
        self._served_entity = served_entity
        metrics.gpu_unusable.set(gpu_problem() is not None)
        self.log: InferenceLog | None = None
        self._embedder: Embedder = model.unwrap_python_model().embedder
        self._embedder.reader = IsolatedReader(
            self._embedder.reader, seconds=settings.timeout_seconds, processes=THREADS
        )
        self._reader = RequestReader(model, self._embedder, answer_bytes=settings.max_answer_bytes)
        # The GIL runs one thread at a time, so more threads would only compete for it. Two pools, so that rejections do
        # not wait for embeddings whose clients have left.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="request")
        self._embedding = ThreadPoolExecutor(THREADS, thread_name_prefix="embedding")
        self._batcher = MicroBatcher(
            self._embed_rows, self._embedding, wait_seconds=settings.batch_wait_ms / 1000,
            on_batch=metrics.batch_requests.observe,
        )  # fmt: skip
        self._in_flight = self._computing = self._body_bytes = 0  # requests, those computing, bytes of bodies
        _ = self._embedder.gene_table

    def app(self, token: str) -> FastAPI:
        """Return the app with its routes; with a token, all but the health checks require it."""
        app = FastAPI(openapi_url=None)
        for path in HEALTH_ROUTES:
            app.add_api_route(path, _healthy, methods=["GET"])
        app.add_api_route("/version", _mlflow_version, methods=["GET"])
        app.add_route("/invocations", self.invocations, methods=["POST"])
        app.add_route("/metrics", self.prometheus, methods=["GET"])
        if token:
            app.add_middleware(_BearerToken, token=token, unauthorized=self.metrics.unauthorized)
        app.add_middleware(_HeaderLimit)
        return app

    async def prometheus(self, _: Request) -> Response:
        """Return the metrics in Prometheus' format."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def invocations(self, request: Request) -> Response:
        """Handle a request; every response is in the spool before it is sent."""
        requester = _requester(request, self._settings.trusted_proxies)
        call = _Call(uuid.uuid4().hex, datetime.now(UTC), time.monotonic(), requester)
        self._in_flight += 1
        self.metrics.in_flight.set(self._in_flight)
        try:
            status, content = await self._answer_or_error(request, call)
            return await _run_in(self._threads, self._finish, call, status, content)
        except ClientDisconnect:
            if call.body is None:
                return Response(status_code=HTTPStatus.BAD_REQUEST)  # the client has disconnected
            return await _run_in(self._threads, self._finish, call, CLIENT_CLOSED_REQUEST, b"")
        finally:
            self._body_bytes -= call.received
            self._in_flight -= 1
            self.metrics.in_flight.set(self._in_flight)

    async def _answer_or_error(self, request: Request, call: _Call) -> tuple[int, bytes]:
        try:
            return HTTPStatus.OK, await self._answer(request, call)
        except RequestRefused as exc:
            return _error(exc.status, str(exc))
        except ClientDisconnect:
            raise
        except Exception:  # broad: models and libraries raise anything, and the client must get a status
            logger.exception("request %s failed", call.request_id)  # the client does not get the traceback
            return _error(500, f"the model failed; see the server's log for request {call.request_id}")

    async def _answer(self, request: Request, call: _Call) -> bytes:
        """Read the body, then compute, each within its own time limit; only computing occupies one of the slots."""
        self._reject_when_busy()
        async with _within(self._settings.body_seconds, "the body did not arrive"):
            await self._read_body(request, call)
        self._reject_when_busy()
        self._computing += 1
        try:
            limit, advice = self._settings.timeout_seconds, "send fewer cells, or run the batch job"
            async with _within(limit, "the response was not ready", advice):
                return await _unless_disconnected(request, self._compute(request, call))
        finally:
            call.over = True
            self._computing -= 1

    def _reject_when_busy(self) -> None:
        if self._computing >= self._settings.max_concurrent:
            limit = self._settings.max_concurrent
            raise RequestRefused(429, f"the endpoint is computing {limit} requests, its limit: retry later")

    async def _compute(self, request: Request, call: _Call) -> bytes:
        parsed = await _run_in(self._threads, self._read, call, request.headers.get("content-encoding", "identity"))
        results = await self._embed(parsed.rows, call)
        return await _run_in(self._threads, self._serialize, parsed.rows, results)

    async def _read_body(self, request: Request, call: _Call) -> None:
        """Receive the body, up to the limits for one body and for all bodies in memory."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != JSON:
            raise RequestRefused(415, f"Content-Type must be {JSON}, not {kind!r}")
        limit, chunks = self._settings.max_request_bytes, request.stream()
        stated = request.headers.get("content-length", "0")
        body, size = bytearray(), int(stated) if stated.isdigit() else 0
        while size <= limit and (chunk := await anext(chunks, None)) is not None:
            self._count_body(call, len(chunk))
            body += chunk
            size = max(size, len(body))
        if size > limit:
            raise RequestRefused(413, too_large("the body has", size, limit, "send CSR columns, or fewer cells"))
        call.body, call.began = bytes(body), time.monotonic()
        self.metrics.request_bytes.observe(size)

    def _count_body(self, call: _Call, n_bytes: int) -> None:
        """Count the bytes of all unfinished requests; their limit is that of `max_concurrent` bodies of full size."""
        call.received += n_bytes
        self._body_bytes += n_bytes
        if self._body_bytes > self._settings.max_concurrent * self._settings.max_request_bytes:
            raise RequestRefused(429, "the bodies of unfinished requests have reached the memory limit: retry later")

    def _read(self, call: _Call, encoding: str) -> ParsedRequest:
        assert call.body is not None
        if encoding.strip().lower() == "gzip":
            packed, call.body = call.body, None
            call.body = inflate(packed, self._settings.max_request_bytes)
        elif encoding.strip().lower() != "identity":
            raise RequestRefused(415, f"Content-Encoding must be gzip or absent, not {encoding!r}")
        if self.log is not None:
            self.log.begin(self._exchange(call, HTTPStatus.INTERNAL_SERVER_ERROR, b""))
        parsed = self._reader.read(call.body)
        call.client_request_id = parsed.client_request_id
        return parsed

    async def _embed(self, rows: list[RequestedRow], call: _Call) -> list[RowResult]:
        """Embed rows, in order: static mode directly (a table look-up), other modes batched with other requests."""
        results: list[RowResult] = [RowResult(error=requested.error) for requested in rows]
        for parameters, places in _by_parameters(rows).items():
            group = [rows[i].row for i in places]
            if parameters.mode == "static":
                found = await _run_in(self._embedding, self._embed_rows, group, parameters, lambda: not call.over)
            else:
                found = await self._batcher.answers(group, parameters)
            for i, result in zip(places, found, strict=True):
                results[i] = result
        return results

    def _embed_rows(self, rows: Rows, parameters: Parameters, wanted: Callable[[], bool]) -> list[RowResult]:
        return list(self._embedder.embed_rows(rows, parameters, wanted=wanted))

    def _serialize(self, rows: list[RequestedRow], results: list[RowResult]) -> bytes:
        """Write the response in MLflow's format; orjson writes float32 with full precision, and never NaN."""
        for i, (requested, result) in enumerate(zip(rows, results, strict=True)):
            if result.error is not None and requested.parameters.on_error == "raise":
                raise RequestRefused(500 if _is_server_error(result.error) else 400, f"row {i}: {result.error}")
        d = self._embedder.config.embsize
        columns = [
            answer_columns(result, requested.parameters, d) for requested, result in zip(rows, results, strict=True)
        ]
        content = orjson.dumps({"predictions": columns}, option=orjson.OPT_SERIALIZE_NUMPY)
        limit = self._settings.max_answer_bytes
        if len(content) > limit:
            raise RequestRefused(413, too_large("the response has", len(content), limit, LESS))
        return content

    def _finish(self, call: _Call, status: int, content: bytes) -> Response:
        """Log and count the response, then return it."""
        seconds = time.monotonic() - call.began
        if self.log is not None:
            self.log.append(self._exchange(call, status, content))
        self.metrics.requests.labels(str(int(status))).inc()
        self.metrics.seconds.observe(seconds)
        self.metrics.answer_bytes.observe(len(content))
        headers = {"x-request-id": call.request_id, **({"retry-after": "1"} if status == 429 else {})}
        return Response(content, status, headers, media_type=JSON)

    def _exchange(self, call: _Call, status: int, content: bytes) -> Exchange:
        return Exchange(
            call.request_id, call.at, status, time.monotonic() - call.began, call.body, content,
            call.client_request_id, self._served_entity, call.requester,
            too_large_to_read=status == 413 and call.body is None,
        )  # fmt: skip


async def _healthy() -> Response:
    """Respond as MLflow's server does once the model is loaded."""
    return Response("\n", media_type=JSON)


async def _mlflow_version() -> Response:
    return Response(mlflow.__version__, media_type=JSON)


@asynccontextmanager
async def _within(
    seconds: float, what: str, advice: str = "send a smaller body, or use a faster connection"
) -> AsyncIterator[None]:
    """Raise RequestRefused if the block takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise RequestRefused(408, f"{what} within {seconds:g} s, the limit: {advice}") from None


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, bytes]) -> bytes:
    """Await the work; if the client disconnects first, cancel it and raise ClientDisconnect."""
    computing, disconnected = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({computing, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not computing.done():
            raise ClientDisconnect
        return computing.result()
    finally:
        computing.cancel()
        disconnected.cancel()


async def _disconnected(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _requester(request: Request, proxies: Sequence[str]) -> str | None:
    """Return the client's address: the peer's or, behind trusted proxies, the last address that they forward for."""
    peer = request.client.host if request.client else None
    forwarded = [part.strip() for header in request.headers.getlist("x-forwarded-for") for part in header.split(",")]
    while forwarded and peer in proxies:
        try:
            peer = str(ipaddress.ip_address(forwarded.pop()))
        except ValueError:
            break
    return peer


async def _run_in(pool: Executor, function: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(pool, function, *args)


def _error(status: int, message: str) -> tuple[int, bytes]:
    shown = message if len(message) < 2000 else message[:2000] + " …"
    shown = shown.encode(errors="replace").decode()  # JSON cannot hold half a surrogate pair
    return status, orjson.dumps({"error_code": HTTPStatus(status).name, "message": shown})


def _is_server_error(error: Exception) -> bool:
    return isinstance(error, (NonFiniteOutput, CheckpointError, WorkerCrash))


def _by_parameters(rows: list[RequestedRow]) -> dict[Parameters, list[int]]:
    """Group the valid rows by the parameters that affect their vectors; encoding and error handling do not."""
    rows_of: dict[int, list[int]] = {}  # by identity first: hashing parameters can read 100,000 gene names
    for i, requested in enumerate(rows):
        if requested.error is None:
            rows_of.setdefault(id(requested.parameters), []).append(i)
    groups: dict[Parameters, list[int]] = {}
    for places in rows_of.values():
        same = rows[places[0]].parameters.model_copy(update={"encoding": "list", "on_error": "raise"})
        groups.setdefault(same, []).extend(places)
    return groups


class _HeaderLimit:
    """Rejects requests whose request line and headers are larger than the limit."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            size = len(scope["raw_path"]) + len(scope["query_string"])
            size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
            if size > HEADER_BYTES:
                status, content = _error(
                    431, f"request line and headers have {size} bytes; the limit is {HEADER_BYTES}: send shorter ones"
                )
                await Response(content, status, {"connection": "close"}, media_type=JSON)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _BearerToken:
    """Requires the bearer token, compared in constant time; the header is never stored."""

    def __init__(self, app: Callable[..., Awaitable[None]], token: str, unauthorized: Counter) -> None:
        self._app, self._wanted = app, f"Bearer {token}".encode()
        self._unauthorized, self._unlogged, self._logged_at = unauthorized, 0, -math.inf

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in HEALTH_ROUTES:
            header = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(header, self._wanted):
                self._count(scope["client"])
                status, content = _error(401, f"send the header `Authorization: Bearer` with the value of {TOKEN}")
                response = Response(content, status, {"www-authenticate": "Bearer"}, media_type=JSON)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _count(self, client: tuple[str, int] | None) -> None:
        """Count a request, and log at a bounded rate."""
        self._unauthorized.inc()
        self._unlogged += 1
        if time.monotonic() - self._logged_at >= UNAUTHORIZED_LOG_SECONDS:
            address = client[0] if client else "an unknown address"
            logger.warning("%d requests without a valid token, the last from %s", self._unlogged, address)
            self._unlogged, self._logged_at = 0, time.monotonic()

"""Limits for connections: uvicorn's HTTP/1.1 protocol with a limit for each resource that an idle client can hold.

uvicorn with h11 limits the size of an unfinished header. It limits neither the time a header takes, nor the number of
connections, nor the time a client takes to read its response.
"""

import asyncio
import resource
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_BYTES = 65_536  # of request line and headers
STALL_SECONDS = 30.0  # a connection is dropped when the client reads nothing of its response for this long
FILES_KEPT = 256  # file descriptors for libraries, logs, the table and child processes


@dataclass(frozen=True)
class ConnectionLimits:
    """The maximum number of connections, and the time allowed for a complete header."""

    connections: int
    header_seconds: float


class LimitedProtocol(H11Protocol):
    """One connection; `limited_protocol` returns a subclass with limits."""

    limits: ConnectionLimits
    on_refusal: Callable[[str], None]
    _header_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse("connections", HTTPStatus.SERVICE_UNAVAILABLE, "too many connections: retry later")
        else:
            self._watch_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers."""
        self._header_timer = _cancelled(self._header_timer)
        self._stall_timer = _cancelled(self._stall_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Receive bytes; an incomplete header has a deadline."""
        super().data_received(data)
        self._watch_header()

    def send_400_response(self, msg: str) -> None:
        """Reject a request that is not HTTP or has too long a header; uvicorn calls this."""
        unread, _ = self.conn.trailing_data
        if len(unread) > HEADER_BYTES:
            message = f"request line and headers have more than {HEADER_BYTES} bytes, the limit: send shorter ones"
            self._refuse("header_bytes", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message)
        else:
            self._refuse("invalid", HTTPStatus.BAD_REQUEST, msg)

    def pause_writing(self) -> None:
        """Start to watch whether the client reads its response."""
        super().pause_writing()
        self._watch_response()

    def resume_writing(self) -> None:
        """Stop watching: the client has read its response."""
        self._stall_timer = _cancelled(self._stall_timer)
        super().resume_writing()

    def _watch_header(self) -> None:
        between_requests = self.cycle is None or self.cycle.response_complete
        if not between_requests:
            self._header_timer = _cancelled(self._header_timer)
        elif self._header_timer is None and not self.transport.is_closing():
            self._header_timer = self.loop.call_later(self.limits.header_seconds, self._header_is_late)

    def _header_is_late(self) -> None:
        message = f"no complete header arrived within {self.limits.header_seconds:g} s, the limit"
        self._refuse("header_seconds", HTTPStatus.REQUEST_TIMEOUT, message)

    def _watch_response(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(STALL_SECONDS, self._check_response, unread)

    def _check_response(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch_response()
        else:
            self.on_refusal("answer_not_read")
            self.transport.abort()

    def _refuse(self, reason: str, status: HTTPStatus, message: str) -> None:
        """Send an error outside of any request, and close the connection."""
        self.on_refusal(reason)
        body = orjson.dumps({"error_code": status.name, "message": message})
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


def limited_protocol(limits: ConnectionLimits, on_refusal: Callable[[str], None]) -> type[LimitedProtocol]:
    """Return the protocol class for `uvicorn.Config(http=…)`; `on_refusal` gets the reason of each rejection."""
    members: dict[str, Any] = {"limits": limits, "on_refusal": staticmethod(on_refusal)}
    return type("LimitedProtocol", (LimitedProtocol,), members)


def connections_within_files(desired: int) -> int:
    """Return how many connections the limit of open files allows, at most `desired`; raise the soft limit if needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = desired + FILES_KEPT
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return desired
    raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    return max(1, raised - FILES_KEPT)


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer, if there is one; return None, to store in its place."""
    if timer is not None:
        timer.cancel()
    return None

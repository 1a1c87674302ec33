"""What a connection may cost before a request on it is known: uvicorn's HTTP/1.1 protocol with limits.

uvicorn over h11 bounds an unfinished header, but neither how long it takes, nor the number of connections, nor a client
that does not read its answer.
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
STALL_SECONDS = 30.0  # an answer of which the client takes nothing for so long is dropped
FILES_KEPT = 256  # file descriptors for libraries, logs, the table and child processes


@dataclass(frozen=True)
class ConnectionLimits:
    """How many connections there may be, and how long one may take to send a complete header."""

    connections: int
    header_seconds: float


class LimitedProtocol(H11Protocol):
    """One connection; `limited_protocol` makes the class that has limits."""

    limits: ConnectionLimits
    on_refusal: Callable[[str], None]
    _header_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse("connections", HTTPStatus.SERVICE_UNAVAILABLE, "too many connections: try again later")
        else:
            self._watch_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers."""
        self._header_timer = _cancelled(self._header_timer)
        self._stall_timer = _cancelled(self._stall_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; a header that is not complete has a deadline."""
        super().data_received(data)
        self._watch_header()

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with a request that is not HTTP, or whose header is too long; uvicorn calls this."""
        unread, _ = self.conn.trailing_data
        if len(unread) > HEADER_BYTES:
            told = f"request line and headers hold more than {HEADER_BYTES} bytes, the limit"
            self._refuse("header_bytes", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, told)
        else:
            self._refuse("invalid", HTTPStatus.BAD_REQUEST, msg)

    def pause_writing(self) -> None:
        """Watch that the client takes its answer."""
        super().pause_writing()
        self._watch_answer()

    def resume_writing(self) -> None:
        """Cancel the watch: the client has taken its answer."""
        self._stall_timer = _cancelled(self._stall_timer)
        super().resume_writing()

    def _watch_header(self) -> None:
        between_requests = self.cycle is None or self.cycle.response_complete
        if not between_requests:
            self._header_timer = _cancelled(self._header_timer)
        elif self._header_timer is None and not self.transport.is_closing():
            self._header_timer = self.loop.call_later(self.limits.header_seconds, self._header_is_late)

    def _header_is_late(self) -> None:
        told = f"no complete header within {self.limits.header_seconds:g} s, the limit"
        self._refuse("header_seconds", HTTPStatus.REQUEST_TIMEOUT, told)

    def _watch_answer(self) -> None:
        untaken = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(STALL_SECONDS, self._check_answer, untaken)

    def _check_answer(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch_answer()
        else:
            self.on_refusal("answer_not_read")
            self.transport.abort()

    def _refuse(self, reason: str, status: HTTPStatus, message: str) -> None:
        """Answer outside of any request, and close."""
        self.on_refusal(reason)
        body = orjson.dumps({"error_code": status.name, "message": message})
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


def limited_protocol(limits: ConnectionLimits, on_refusal: Callable[[str], None]) -> type[LimitedProtocol]:
    """Return the protocol class for `uvicorn.Config(http=…)`; `on_refusal` gets the reason of each refusal."""
    members: dict[str, Any] = {"limits": limits, "on_refusal": staticmethod(on_refusal)}
    return type("LimitedProtocol", (LimitedProtocol,), members)


def connections_within_files(wanted: int) -> int:
    """Return how many of the wanted connections leave enough file descriptors; the soft limit is raised first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + FILES_KEPT
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    return max(1, raised - FILES_KEPT)


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer, if there is one; what to keep in its place."""
    if timer is not None:
        timer.cancel()
    return None

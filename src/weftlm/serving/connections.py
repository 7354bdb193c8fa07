"""HTTP/1.1 connections: a deadline in every state, limits on their number, strict framing, bounded logs.

A deadline belongs to a connection and its state, never to bytes: a byte more extends nothing.

    state      from                                     until                     seconds
    head       accepted, or first byte of a request     head complete             intake_seconds
    body       head complete                            body complete             intake_seconds + LINGER_SECONDS
    answer     body complete                            answer written            timeout_seconds + ANSWER_GRACE_SECONDS
    idle       answer written                           next byte                 keep_alive_seconds
    closing    last byte written                        client has taken it       keep_alive_seconds; refused: LINGER

An answer given before its body arrived leaves the connection in `body`. After its deadline a connection is dropped with
whatever it holds.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import re
import time
from collections import Counter
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from weftlm.serving.api_errors import ApiError
from weftlm.serving.serve_config import ServeConfig
from weftlm.serving.stream import ABORT

try:
    import resource
except ModuleNotFoundError:  # no POSIX
    resource = None  # type: ignore[assignment]

LINGER_SECONDS = 2.0
"""Time for a client to read a refusal while the rest of its request is read and discarded."""
ANSWER_GRACE_SECONDS = 4.0
"""Beyond the time limit of a request, in which the application itself ends it with an error."""
MAX_HEAD_BYTES = 32_768
MAX_FRAMING = 16
"""Bytes around each byte of a chunked body, beyond what a head may have."""
OTHER_DESCRIPTORS = 128
"""File descriptors kept for everything but connections: models, workers, logs."""
LOG_LINES, LOG_SECONDS = 5, 60.0
"""Lines of one kind per period; further ones are counted."""
LOGGERS = ("asyncio", "uvicorn.error", "weftlm.serving.engine", "weftlm.serving.stream", "weftlm.serving.workers")
"""Loggers that a client's behaviour can reach."""

_UNCLEAN = re.compile(
    rb"(?<!\r)\n"  # a line that ends without CR
    rb"|\r\n[ \t]"  # a folded header line
    rb"|\r\n[^:\r\n]*[ \t]:"  # a blank before the colon
    rb"|\r\ncontent-length:[^\r]*[^0-9 \t\r]"  # a length that is no number, a list among them
    rb"|\r\ncontent-length:(?s:.*)\r\n(?:content-length|transfer-encoding):"
    rb"|\r\ntransfer-encoding:(?s:.*)\r\n(?:content-length|transfer-encoding):"
    rb"|\A[^\r\n]*HTTP/1\.0\r\n(?s:.*)\r\ntransfer-encoding:"
    rb"|\A[^\r\n]*HTTP/1\.0\r\ntransfer-encoding:",
    re.IGNORECASE,
)
"""Heads that two servers may read as different requests."""


class StrictConnection(h11.Connection):
    """h11's parser, which also refuses what a proxy in front may frame in another way."""

    received = delivered = 0  # bytes of the body of a request, as sent and without its framing

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the socket; see `h11.Connection.receive_data`."""
        self.received += len(data)
        super().receive_data(data)

    def next_event(self) -> Any:
        """The next event; see `h11.Connection.next_event`.

        Raises:
            RemoteProtocolError: the request is not valid, ambiguous, or wrapped in too much framing.
        """
        if self.their_state is h11.IDLE and (buffer := self.trailing_data[0]):
            head, end, _ = buffer.partition(b"\r\n\r\n")
            complete = head if end else head.rpartition(b"\r\n")[0]
            if len(head) > MAX_HEAD_BYTES or _UNCLEAN.search(complete + b"\r\n"):
                raise h11.RemoteProtocolError("ambiguous or too large request head")
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.received, self.delivered = len(self.trailing_data[0]), 0
            if event.http_version not in (b"1.0", b"1.1"):
                raise h11.RemoteProtocolError("unsupported version")
        elif isinstance(event, h11.Data):
            self.delivered += len(event.data)
            framing = self.received - self.delivered - len(self.trailing_data[0])
            if framing > MAX_HEAD_BYTES + MAX_FRAMING * self.delivered:
                raise h11.RemoteProtocolError("too long chunk extensions")
        elif isinstance(event, h11.EndOfMessage) and event.headers:
            raise h11.RemoteProtocolError("trailers are not supported")
        return event


class Admission:
    """Open connections by client, and how many there may be.

    A client is an IPv4 address or an IPv6 network of 64 bits.

    Attributes:
        config: its limits.
        most: connections in all: as configured, and no more than file descriptors allow.
        open: connections by client.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.most = min(config.max_connections, _descriptors(config.max_connections))
        self.open: Counter[str] = Counter()

    def enter(self, client: str) -> ApiError | None:
        """Count a connection; the error it gets where there is no room for it."""
        if self.open.total() >= self.most:
            return ApiError(
                503, "the server has too many open connections; try again later", code="too_many_connections"
            )
        if self.open[client] >= self.config.max_connections_per_client:
            return ApiError(
                429,
                f"{self.open[client]} connections are open from this address; close some, or reuse them",
                code="too_many_connections",
            )
        self.open[client] += 1
        return None

    def leave(self, client: str) -> None:
        """A counted connection ended."""
        self.open[client] -= 1
        if self.open[client] <= 0:
            del self.open[client]


def client_of(address: str) -> str:
    """The unit that connections are counted by."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


def _descriptors(wanted: int) -> int:
    """Connections that file descriptors allow; the soft limit is raised as far as needed and allowed."""
    if resource is None:
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + OTHER_DESCRIPTORS:
        soft = wanted + OTHER_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, wanted + OTHER_DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, soft - OTHER_DESCRIPTORS)


def connection_class(admission: Admission) -> type[H11Protocol]:
    """The protocol class of a server, for uvicorn's `http`."""
    config = admission.config
    seconds = {
        "head": config.intake_seconds,
        "body": config.intake_seconds + LINGER_SECONDS,
        "answer": config.timeout_seconds + ANSWER_GRACE_SECONDS,
        "idle": config.keep_alive_seconds,
        "closing": config.keep_alive_seconds,
        "refused": LINGER_SECONDS,
    }

    class Limited(_Connection):
        pass

    Limited.admission = admission
    Limited.seconds = seconds
    return Limited


class _Connection(H11Protocol):
    """uvicorn's HTTP/1.1 with the deadlines and limits of this file, and JSON bodies for what is no HTTP."""

    admission: Admission
    seconds: dict[str, float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = StrictConnection(h11.SERVER, MAX_HEAD_BYTES)
        inner: Any = self.app
        self._refused = False
        self._counted: str | None = None
        self._state: tuple[str, object] | None = None
        self._timer: asyncio.TimerHandle | None = None

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope[ABORT] = self.transport.abort
            await inner(scope, receive, send)

        self.app = app

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        client = client_of(self.client[0] if self.client else "")
        error = self.admission.enter(client)
        if error is None:
            self._counted = client
        else:
            self._refused = True
            transport.write(
                b"HTTP/1.1 %d Refused\r\nretry-after: 5\r\n%s\r\n\r\n%s" % (error.status_code, *_head_and_body(error))
            )
            transport.close()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._counted is not None:
            self.admission.leave(self._counted)
            self._counted = None
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)
            self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # the deadline of `idle` is kept here
        self._watch()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # in the middle of a response there is no place for another
            return
        error = ApiError(400, "this is no valid HTTP request", code="invalid_http")
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n%s\r\n\r\n%s" % _head_and_body(error))
        # A connection closed with something unread is reset, and the client may never see the answer.
        self._refused = True
        if self._answered() is False:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write_eof()

    def _now(self) -> tuple[str, object]:
        """The state of the connection, and the request it belongs to."""
        if self._refused:
            return "refused", None
        if self.transport.is_closing():
            return "closing", None
        if self.conn.their_state is h11.SEND_BODY:
            return "body", self.cycle
        if self._answered() is False:
            return "answer", self.cycle
        return ("idle" if self._answered() and not self.conn.trailing_data[0] else "head"), self.cycle

    def _answered(self) -> bool | None:
        """Whether the newest request has its whole answer; None before the first request."""
        return getattr(self.cycle, "response_complete", None)

    def _watch(self) -> None:
        """Begin the deadline of a state that is new."""
        state = self._now()
        if state == self._state:
            return
        self._state = state
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self.seconds[state[0]], self.transport.abort)


def _head_and_body(error: ApiError) -> tuple[bytes, bytes]:
    body = json.dumps({"error": error.detail_dict()}).encode("ascii")
    return b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close" % len(body), body


class SparseLog(logging.Filter):
    """Passes a few lines of each kind per period, so that no client can fill a disk with them.

    A kind is a logger with the first line of its message before any values are put in.
    """

    def __init__(self, lines: int = LOG_LINES, seconds: float = LOG_SECONDS) -> None:
        super().__init__()
        self.lines, self.seconds = lines, seconds
        self._kinds: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is written; the first of a new period says how many were not."""
        now = time.monotonic()
        kind = record.name, str(record.msg).partition("\n")[0][:200]
        begun, count = self._kinds.get(kind, (now, 0))
        if now - begun >= self.seconds:
            if count > self.lines:
                record.msg = f"{record.msg} [{count - self.lines} lines like this were left out before]"
            begun, count = now, 0
        if len(self._kinds) > 1_000:
            self._kinds.clear()
        self._kinds[kind] = begun, count + 1
        return count < self.lines

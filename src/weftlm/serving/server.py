"""The web server around the application: its socket, its signals, and what it says to a broken request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from weftlm.errors import ConfigError
from weftlm.serving.api_errors import ApiError
from weftlm.serving.request import Generator
from weftlm.serving.serve_config import ServeConfig
from weftlm.serving.stream import ABORT

KEEP_ALIVE_SECONDS = 30
LINGER_SECONDS = 2.0
"""What is no HTTP is answered, and the rest of it read and thrown away for so long."""

STOP_SECONDS = 5
"""Running answers are ended at once; clients have so long to take what was written."""


class Server(uvicorn.Server):
    """uvicorn for engines: closes them before it waits for its clients, so that every answer ends and none is awaited.

    SIGINT and SIGTERM stop it; a second SIGINT stops it without waiting for clients.

    Attributes:
        app: of `build_app`.
        engines: name -> engine.
    """

    def __init__(
        self,
        app: FastAPI,
        engines: Mapping[str, Generator],
        config: ServeConfig,
        ready: Callable[[], None] | None = None,
    ) -> None:
        """Prepare a server.

        Args:
            app: of `build_app`.
            engines: closed when the server stops.
            config: for its time-outs.
            ready: called once connections are accepted.
        """

        class Protocol(_Protocol):
            head_seconds = config.intake_seconds

        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )
        self.app = app
        self.engines = engines
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and tell."""
        await super().startup(sockets=sockets)
        if self._ready is not None:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, end what runs, let clients take it, and stop."""
        self.app.state.stopping = True
        closing = [asyncio.to_thread(engine.close) for engine in self.engines.values()]
        await asyncio.gather(super().shutdown(sockets=sockets), *closing)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGINT and SIGTERM; a stop that was asked for is no failure, so they are not raised again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Protocol(H11Protocol):
    """HTTP/1.1 with three additions.

    What is no HTTP gets a JSON body too; a head must arrive within a time; and the application can drop a connection
    whose client does not read.
    """

    head_seconds = 20.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        inner: Any = self.app
        self._head_timer: asyncio.TimerHandle | None = None
        self._refused = False

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope[ABORT] = self.transport.abort
            await inner(scope, receive, send)

        self.app = app

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)
            self._watch_head()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # in the middle of a response there is no place for another
            return
        error = ApiError(400, "this is no valid HTTP request", code="invalid_http")
        body = json.dumps({"error": error.detail_dict()}).encode("ascii")
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode("ascii")),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        # A connection closed with something unread is reset, and the client may never see the answer.
        self._refused = True
        self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _watch_head(self) -> None:
        """Have the timer run while the head of a request is awaited."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._forget_head()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self._head_late)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()


def listen(host: str, port: int, timeout_seconds: float) -> socket.socket:
    """A listening socket.

    Args:
        host: name or address.
        port: 0 for one that is free.
        timeout_seconds: after which the system drops a connection whose client takes nothing, where it can.
    Raises:
        ConfigError: the address is not this machine's, or is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host!r} is no address of this machine: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_seconds * 1000))
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(f"{host} port {port} cannot be listened on: {error}; choose another --port") from error
    return listener


def address_of(listener: socket.socket) -> str:
    """`http://host:port` of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

"""The web server around the application: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from weftlm.errors import ConfigError, reason
from weftlm.serving.request import Generator
from weftlm.serving.serve_config import ServeConfig

BACKLOG = 128
"""Connections that wait to be accepted; also the number accepted at a time."""
MAX_HEAD_BYTES = 32_768
STOP_SECONDS = 5
"""Running answers are ended at once; clients have so long to take what was written."""


class _Connection(H11Protocol):
    """uvicorn's connection, closed after `intake_seconds` to twice that without a new request or a running answer.

    uvicorn's own timer is for connections that send nothing; here no byte extends anything, whether a head never ends,
    a body comes after its answer, or an answer is not read. Beyond `max_connections` connections are closed at once.
    """

    intake_seconds: float
    max_connections: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        self.loop.call_later(self.intake_seconds, self._watch, None)

    def _watch(self, last: Any) -> None:
        """Drop the connection unless a request began since the last look, or is being answered."""
        cycle: Any = self.cycle
        idle = cycle is None or cycle.response_complete or self.transport.is_closing()
        if idle and cycle is last:
            self.transport.abort()
        else:
            self.loop.call_later(self.intake_seconds, self._watch, self.cycle)

    def send_400_response(self, msg: str) -> None:
        cycle: Any = self.cycle  # None before the first request, whatever uvicorn declares
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.close()  # in the middle of a response there is no place for another
        else:
            super().send_400_response(msg)


class Server(uvicorn.Server):
    """uvicorn for engines: closes them before it waits for its clients, so that every answer ends and none is awaited.

    SIGINT and SIGTERM stop it; a second SIGINT stops it without waiting for clients.

    Args:
        app: Result of `build_app`.
        engines: Engines by name, closed when the server stops.
        config: Time-outs and limits.
        ready: Called once connections are accepted.
    """

    def __init__(
        self,
        app: FastAPI,
        engines: Mapping[str, Generator],
        config: ServeConfig,
        ready: Callable[[], None] | None = None,
    ) -> None:
        limits = {"intake_seconds": config.intake_seconds, "max_connections": 2 * config.max_connections}
        super().__init__(
            uvicorn.Config(
                app,
                http=type("Connection", (_Connection,), limits),
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="error",  # clients cannot fill the log: what they can cause is logged below this level
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                limit_concurrency=config.max_connections,
                timeout_keep_alive=math.ceil(config.intake_seconds),
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                loop="asyncio",
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )
        self.app = app
        self.engines = engines
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and report it."""
        await super().startup(sockets=sockets)
        if self._ready is not None:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, end what runs, let clients take it, and stop."""
        self.app.state.stopping = True
        closing = [asyncio.to_thread(engine.close) for engine in self.engines.values()]
        closing.append(asyncio.to_thread(self.app.state.templates.close))
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


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Args:
        host: Name or address.
        port: 0 for a free one.
    Raises:
        ConfigError: The address is not this machine's, or is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"{host} port {port} cannot be listened on: {reason(error)}; choose another --host or --port"
        ) from error


def address_of(listener: socket.socket) -> str:
    """`http://host:port` of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

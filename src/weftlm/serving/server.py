"""The web server around the application: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable, Mapping
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from weftlm.errors import ConfigError, reason
from weftlm.serving.engine import Engine
from weftlm.serving.serve_config import ServeConfig

BACKLOG = 128
"""Connections that wait to be accepted; also the number accepted at a time."""
MAX_HEAD_BYTES = 32_768
GRACE_SECONDS = 3.0
"""Time beyond the request timeout, which engines keep, after which the connection of an unfinished answer is closed."""
STOP_SECONDS = 5
"""Running answers are ended at once; clients have so long to take what was written."""


class _Connection(H11Protocol):
    """uvicorn's connection with a time limit in every state.

    uvicorn's own timer is for connections that send nothing; here no byte extends anything. A connection is aborted
    when it was for `intake_seconds` to twice that without a request, within the body of one, with one that is answered,
    or closing, and when an answer is not finished or not read for `answer_seconds`. Beyond `max_connections`
    connections are aborted at once.
    """

    intake_seconds: float
    answer_seconds: float
    max_connections: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        self._watch(None, self.loop.time())

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()  # else it keeps all objects of a finished connection until the limit
        super().connection_lost(exc)

    def _watch(self, last: Any, since: float) -> None:
        """Abort the connection at its limit; `last` is its state at the look before, first seen at `since`."""
        cycle: Any = self.cycle  # None before the first request, whatever uvicorn declares
        closing = self.transport.is_closing()
        waiting = cycle is None or cycle.more_body or cycle.response_complete or closing
        state, now = (cycle, waiting, closing), self.loop.time()
        since = since if state == last else now
        if now - since >= (self.intake_seconds if waiting else self.answer_seconds):
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(self.intake_seconds, self._watch, state, since)

    def send_400_response(self, msg: str) -> None:
        cycle: Any = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.close()  # in the middle of a response there is no place for another
        else:
            super().send_400_response(msg)


class Server(uvicorn.Server):
    """uvicorn for engines: closes them before it waits for its clients, so that every answer ends and none is awaited.

    SIGINT and SIGTERM stop it; a second SIGINT stops it without waiting for clients. `ready` is called once connections
    are accepted.
    """

    def __init__(
        self, app: FastAPI, engines: Mapping[str, Engine], config: ServeConfig, ready: Callable[[], None]
    ) -> None:
        limits = {
            "intake_seconds": config.intake_seconds,
            "answer_seconds": config.timeout_seconds + GRACE_SECONDS,
            "max_connections": 2 * config.max_connections,
        }
        # Clients cannot fill the log: what they can cause is logged below the level of errors.
        super().__init__(
            uvicorn.Config(
                app, http=type("Connection", (_Connection,), limits), ws="none", loop="asyncio", backlog=BACKLOG,
                log_config=None, log_level="error", access_log=False, server_header=False,
                limit_concurrency=config.max_connections, h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                timeout_keep_alive=math.ceil(config.intake_seconds), timeout_graceful_shutdown=STOP_SECONDS,
            )
        )  # fmt: skip
        self.engines = engines
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and report it."""
        await super().startup(sockets=sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, end what runs, let clients take it, and stop."""
        closing = [asyncio.to_thread(engine.close) for engine in self.engines.values()]
        await asyncio.gather(super().shutdown(sockets=sockets), *closing)
        self._captured_signals.clear()  # a stop that was asked for is no failure: uvicorn would raise it again


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

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

"""The web server around the application: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping

import uvicorn
from fastapi import FastAPI

from weftlm.errors import ConfigError, reason
from weftlm.serving.connections import LOGGERS, Admission, SparseLog, connection_class
from weftlm.serving.request import Generator
from weftlm.serving.serve_config import ServeConfig

BACKLOG = 128
"""Connections that wait to be accepted; also the number accepted at a time."""
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
        super().__init__(
            uvicorn.Config(
                app,
                http=connection_class(Admission(config)),
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                loop="asyncio",
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )
        self.app = app
        self.engines = engines
        self._ready = ready

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until stopped; while it does, logs that clients can reach are bounded."""
        sparse, loggers = SparseLog(), [logging.getLogger(name) for name in LOGGERS]
        for logger in loggers:
            logger.addFilter(sparse)
        try:
            await super().serve(sockets=sockets)
        finally:
            for logger in loggers:
                logger.removeFilter(sparse)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and tell."""
        await super().startup(sockets=sockets)
        if self._ready is not None:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, end what runs, let clients take it, and stop."""
        self.app.state.stopping = True
        closing = [asyncio.to_thread(self.app.state.workers.close)]
        closing += [asyncio.to_thread(engine.close) for engine in self.engines.values()]
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
        raise ConfigError(f"--host {host!r} is no address of this machine: {reason(error)}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_seconds * 1000))
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{host} port {port} cannot be listened on: {reason(error)}; choose another --port"
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """`http://host:port` of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

"""A real web server in a thread of the test, on a port the system chooses."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from weftlm.serving.app import build_app
from weftlm.serving.engine import Engine
from weftlm.serving.serve_config import ServeConfig
from weftlm.serving.server import Server, address_of, listen


@dataclass(frozen=True)
class Web:
    """A running server."""

    address: str
    server: Server
    thread: threading.Thread

    def stop(self) -> None:
        """As SIGTERM would."""
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive(), "the server did not stop"

    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop it runs on."""
        return self.server.servers[0].get_loop()

    def connect(self) -> socket.socket:
        """A bare connection."""
        host, _, port = self.address.removeprefix("http://").rpartition(":")
        return socket.create_connection((host, int(port)), timeout=10)


@contextmanager
def serving(engines: Mapping[str, Engine], config: ServeConfig | None = None) -> Iterator[Web]:
    """Serve engines until the block ends; they are closed with the server."""
    config = config or ServeConfig()
    ready = threading.Event()
    with listen("127.0.0.1", 0) as listener:
        server = Server(build_app(engines, config), engines, config, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        web = Web(address_of(listener), server, thread)
        thread.start()
        try:
            assert ready.wait(20), "the server did not start"
            yield web
        finally:
            web.stop()


def wait_until(done: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None, seconds: float = 8.0) -> None:
    """Wait for something the server does by itself."""
    end = time.monotonic() + seconds
    time.sleep(0.05)
    while not done():
        assert time.monotonic() < end, "it did not come"
        meanwhile()
        time.sleep(0.01)

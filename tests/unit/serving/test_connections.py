"""The API over real connections: clients that leave, stall or send nonsense; deadlines, limits, the end of a server."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.fake_engine import FakeEngine
from support.web import Web, serving, wait_until
from uvicorn.protocols.http.h11_impl import H11Protocol

from weftlm.errors import ConfigError
from weftlm.pipeline.any_model import OpenModel
from weftlm.serving import server as server_module
from weftlm.serving.request import Finished, Token
from weftlm.serving.serve_config import KEYS_VARIABLE, ServeConfig, keys_from_environment
from weftlm.serving.server import address_of, listen

SHORT = 0.3
LARGE = "x" * 400_000
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def engine(opened: OpenModel) -> FakeEngine:
    return FakeEngine(opened)


@pytest.fixture(scope="module")
def web(engine: FakeEngine) -> Iterator[Web]:
    with serving({"tiny": engine}) as web:
        yield web


@pytest.fixture(scope="module")
def answering(opened: OpenModel) -> Iterator[Web]:
    with serving({"tiny": FakeEngine(opened, lambda *_: [Token(65, "b"), Finished("length")])}) as web:
        yield web


def asked(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": "the sea", "max_tokens": 8, **fields}).encode()


def post(body: bytes, *headers: bytes, length: int | None = None) -> bytes:
    size = b"Content-Length: %d" % (len(body) if length is None else length)
    return HEAD + b"\r\n".join([size, *headers, b"", b""]) + body


def closing(**fields: Any) -> bytes:
    return post(asked(**fields), b"Connection: close")


def read_all(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError, TimeoutError):
        while piece := connection.recv(1 << 16):
            received += piece
    return received


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    received = b""
    while mark not in received:
        piece = connection.recv(4096)
        assert piece, f"the connection ended after {received!r}"
        received += piece
    return received


def trickle(connection: socket.socket, piece: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(piece)


# -- clients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["while it waits", "while tokens come", "before its stream", "within its stream"])
def test_a_client_that_leaves_gives_its_places_up(web: Web, engine: FakeEngine, when: str) -> None:
    with web.connect() as connection:
        connection.sendall(closing(stream="stream" in when, n=2))
        requests = [engine.wait_for_request(), engine.wait_for_request()]
        if when == "within its stream":
            requests[1].say(Token(65, "a"))
            read_until(connection, b"data: ")
        assert not requests[1].given_up.is_set()
    coming = (lambda: requests[1].say(Token(65, "a"))) if when == "while tokens come" else lambda: None
    for request in engine.requests[-2:]:
        wait_until(request.given_up.is_set, coming)


def test_clients_that_wait_take_no_threads(web: Web, engine: FakeEngine) -> None:
    before = threading.active_count()
    connections = [web.connect() for _ in range(60)]
    for connection in connections:
        connection.sendall(closing())
        engine.wait_for_request()
    assert threading.active_count() - before < 40, "those of the pool that tokenises"
    for request in engine.requests[-60:]:
        request.say(Token(65, "b"), Finished("length"))
    for connection in connections:
        assert b'"text":"b"' in read_all(connection)
        connection.close()


def test_nonsense_after_a_request_does_not_disturb_it(web: Web, engine: FakeEngine) -> None:
    with web.connect() as connection:
        connection.sendall(post(asked()))
        request = engine.wait_for_request()
        connection.sendall(b"\x00nonsense\r\n\r\n")
        request.say(Token(65, "b"), Finished("length"))
        received = read_all(connection)
        assert received.startswith(b"HTTP/1.1 200 ")
        assert b'"text":"b"' in received


# -- connections --------------------------------------------------------------------------------------------------

STATES: dict[str, tuple[list[bytes], bytes]] = {
    # what is sent, and what is sent again and again after it
    "head": ([b"POST /v1/comp"], b"l"),
    "body": ([post(b"{", length=1_000)], b" "),
    "body in chunks": ([post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")], b"1\r\n \r\n"),
    "too large": ([post(b"", length=10**9)], b" "),
    "waiting for 100-continue": ([post(b"", b"Expect: 100-continue", length=1_000)], b" "),
    "idle": ([HEALTH], b""),
    "empty lines": ([HEALTH], b"\r\n"),
    "answer awaited": ([post(asked())], b"x"),
    "stream not read": ([post(asked(stream=True))], b""),
    "last answer not read": ([closing()], b""),
    "refused": ([b"hello\r\n\r\n"], b"x"),
    "upgrade": ([HEALTH[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"], b"x"),
}


@pytest.mark.parametrize("state", STATES)
def test_no_state_of_a_connection_lasts(
    opened: OpenModel, state: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "GRACE_SECONDS", 0.1)
    script = (lambda *_: [*[Token(65, LARGE)] * 30, Finished("length")]) if "read" in state else None
    sent, again = STATES[state]
    config = ServeConfig(intake_seconds=SHORT, timeout_seconds=SHORT)
    with serving({"tiny": FakeEngine(opened, script)}, config) as web:
        with web.connect() as connection:
            for piece in sent:
                connection.sendall(piece)
            wait_until(lambda: not web.server.server_state.connections, lambda: trickle(connection, again))
        with web.connect() as other:
            other.sendall(HEALTH)
            assert other.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert [record for record in caplog.records if record.exc_info] == [], "clients cause no tracebacks"


def test_a_finished_connection_leaves_nothing(opened: OpenModel) -> None:
    """Else a busy server keeps thousands of them for `intake_seconds`, and garbage collection searches them all."""

    def kept() -> int:
        gc.collect()
        return sum(issubclass(type(each), H11Protocol) for each in gc.get_objects())

    engine = FakeEngine(opened, lambda *_: [Token(65, "b"), Finished("length")])
    with serving({"tiny": engine}, ServeConfig(intake_seconds=600.0)) as web:
        before = kept()
        for sent in (closing(), closing(stream=True), closing(prompt=-1), b"nonsense\r\n\r\n"):
            with web.connect() as connection:
                connection.sendall(sent)
                assert read_all(connection)
        with web.connect() as connection:
            connection.sendall(HEALTH)
            read_until(connection, b"ok")
        wait_until(lambda: kept() <= before)


def test_an_answer_that_closes_its_connection_is_written_whole(opened: OpenModel) -> None:
    """It ends after more than `intake_seconds`, and is read a little later."""
    engine = FakeEngine(opened)
    with serving({"tiny": engine}, ServeConfig(intake_seconds=1.0)) as web, web.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.sendall(closing())
        request = engine.wait_for_request()
        time.sleep(1.5)
        request.say(*[Token(65, LARGE)] * 10, Finished("length"))
        time.sleep(0.3)
        assert read_all(connection).count(b"x") >= 10 * len(LARGE)


def test_connections_are_limited_and_places_come_back(opened: OpenModel) -> None:
    with serving({"tiny": FakeEngine(opened)}, ServeConfig(max_connections=3)) as web:
        connections = web.server.server_state.connections
        open_ones = [web.connect() for _ in range(6)]
        wait_until(lambda: len(connections) == 6)
        with web.connect() as further:
            assert read_all(further) == b"", "twice as many, and the connection is closed"
        open_ones[0].sendall(HEALTH)
        assert open_ones[0].recv(4096).startswith(b"HTTP/1.1 503 ")
        while len(open_ones) > 2:
            open_ones.pop(0).close()
        wait_until(lambda: len(connections) == 2)
        open_ones[0].sendall(HEALTH)
        assert open_ones[0].recv(4096).startswith(b"HTTP/1.1 200 ")
        for connection in open_ones:
            connection.close()


BODY = asked()
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
SIZE = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
AMBIGUOUS = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n",
    "endless path": b"GET /" + b"a" * 2_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "length and chunked": HEAD + SIZE + CHUNKED + b"\r\n" + CHUNKS,
    "signed length": HEAD + b"Content-Length: +%d\r\n\r\n" % len(BODY) + BODY,
    "bare CR": HEAD + SIZE + b"X-A: b\rc\r\n\r\n" + BODY,
    "space before colon": HEAD + b"Content-Length : %d\r\n\r\n" % len(BODY) + BODY,
    "gzip, chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS,
    "chunk size with sign": HEAD + CHUNKED + b"\r\n+5\r\nabcde\r\n0\r\n\r\n",
    "two hosts": HEAD + b"Host: other\r\n" + SIZE + b"\r\n" + BODY,
    "many headers": HEAD + SIZE + b"X-A: a\r\n" * 20_000 + b"\r\n" + BODY,
    "body too large, still sent": closing(prompt="x" * 3_000_000),
}


@pytest.mark.parametrize("shape", AMBIGUOUS)
def test_what_two_servers_may_read_differently_is_refused(answering: Web, shape: str) -> None:
    with answering.connect() as connection:
        trickle(connection, AMBIGUOUS[shape] + HEALTH)
        received = read_all(connection)
    assert received.count(b"HTTP/1.1 ") <= 1, "what follows is no request of its own"
    assert not received or received.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 ")), received[:300]
    assert received or len(AMBIGUOUS[shape]) > 100_000, "reset, when more came than was read"


def test_unusual_requests_are_answered_in_order(answering: Web) -> None:
    for sent, statuses in (
        (HEAD + CHUNKED + b"\r\n" + CHUNKS.replace(b"\r\n", b";a=b\r\n", 1), [200]),
        (HEALTH.replace(b"/healthz", b"/page/%2e%2e%2f%2e%2e%2fetc%2fpasswd"), [404]),
        (HEALTH.replace(b"/healthz", b"/page/..%5cserver.py"), [404]),
        (HEAD + SIZE + b"Expect: 100-continue\r\n\r\n" + BODY, [100, 200]),
        (HEALTH + HEAD + SIZE + b"\r\n" + BODY + HEALTH, [200, 200, 200]),
    ):
        with answering.connect() as connection:
            connection.sendall(sent)
            connection.settimeout(1.0)
            assert list(map(int, re.findall(rb"HTTP/1\.1 (\d+) ", read_all(connection)))) == statuses, sent[:60]


# -- the server ---------------------------------------------------------------------------------------------------


def test_a_server_that_stops_ends_what_runs(opened: OpenModel) -> None:
    engine = FakeEngine(opened)
    with serving({"tiny": engine}) as web, web.connect() as begun, web.connect() as waiting, web.connect() as idle:
        begun.sendall(closing(stream=True))
        engine.wait_for_request().say(Token(65, "a"))
        received = read_until(begun, b"data: ")
        waiting.sendall(closing())
        engine.wait_for_request()
        idle.sendall(HEALTH)
        read_until(idle, b'{"status":"ok"}')
        web.stop()
        received += read_all(begun)
        assert b'"finish_reason":"cancelled"' in received
        assert b"data: [DONE]" in received
        refused = read_all(waiting)
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["code"] == "stopping"
        assert read_all(idle) == b""
    assert engine.running == 0


def test_listening() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert address_of(listener) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"port {port} cannot be listened on"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="port 0 cannot be listened on"):
        listen("no.such.host.invalid", 0)


@pytest.mark.parametrize(
    ("given", "found"),
    [(None, ()), (" one, two ,", ("one", "two")), (" , ", "holds no key"), ("one,s\u00e9cret", "key 2")],
)
def test_keys_come_from_the_environment(given: str | None, found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(KEYS_VARIABLE, given)
    if not isinstance(found, str):
        assert keys_from_environment() == found
        return
    with pytest.raises(ConfigError, match=found) as caught:
        keys_from_environment()
    assert "cret" not in str(caught.value)

"""The API over real connections: clients that leave, read slowly, send slowly or send nonsense; the server's end."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support.fake_engine import FakeEngine, words
from support.served import write_model
from support.web import Web, serving

from weftlm.errors import ConfigError
from weftlm.pipeline.any_model import OpenModel, open_model
from weftlm.serving import server as server_module
from weftlm.serving.request import Finished, Token
from weftlm.serving.serve_config import KEYS_VARIABLE, ServeConfig, is_loopback, keys_from_environment
from weftlm.serving.server import _Connection, address_of, listen


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    return open_model(write_model(tmp_path_factory.mktemp("served"), "plain"))


@pytest.fixture
def engine(opened: OpenModel) -> FakeEngine:
    return FakeEngine(opened)


@pytest.fixture
def web(engine: FakeEngine) -> Iterator[Web]:
    with serving({"tiny": engine}) as web:
        yield web


def request_of(**fields: Any) -> bytes:
    body = json.dumps({"model": "tiny", "prompt": "the sea", "max_tokens": 8, **fields}).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    ) + body


def read_all(connection: socket.socket) -> bytes:
    received = bytearray()
    try:
        while piece := connection.recv(1 << 16):
            received += piece
    except ConnectionResetError:
        pass
    return bytes(received)


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    received = b""
    while mark not in received:
        piece = connection.recv(4096)
        assert piece, f"the connection ended after {received!r}"
        received += piece
    return received


def error_in(response: bytes, status: int) -> dict[str, Any]:
    head, _, body = response.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), response[:300]
    assert b"application/json" in head
    return json.loads(body)["error"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_gives_its_places_up(web: Web, engine: FakeEngine, stream: bool) -> None:
    with web.connect() as connection:
        connection.sendall(request_of(stream=stream, n=2))
        tickets = [engine.wait_for_request(), engine.wait_for_request()]
    assert len({id(ticket) for ticket in engine.tickets}) == 2
    assert all(ticket.cancelled.wait(10) for ticket in tickets)
    assert all(ticket.cancelled.wait(10) for ticket in engine.tickets)


def test_a_client_that_leaves_in_the_middle_of_a_stream(web: Web, engine: FakeEngine) -> None:
    with web.connect() as connection:
        connection.sendall(request_of(stream=True))
        ticket = engine.wait_for_request()
        ticket.say(Token(65, "a"))
        read_until(connection, b"data: ")
        assert not ticket.cancelled.is_set()
    assert ticket.cancelled.wait(10)


def test_tokens_are_sent_as_they_come(web: Web, engine: FakeEngine) -> None:
    with web.connect() as connection:
        connection.sendall(request_of(stream=True))
        ticket = engine.wait_for_request()
        for text in ("one", "two", "three"):
            ticket.say(Token(65, text))
            read_until(connection, b'"%s"' % text.encode())
        ticket.say(Finished("stop"))
        assert b"[DONE]" in read_all(connection)


def test_clients_that_wait_take_no_threads(web: Web, engine: FakeEngine) -> None:
    before = threading.active_count()
    connections = [web.connect() for _ in range(60)]
    for connection in connections:
        connection.sendall(request_of())
        engine.wait_for_request()
    assert threading.active_count() - before < 40, "those of the pool that tokenises"
    for ticket in engine.tickets:
        ticket.say(Token(65, "b"))
        ticket.say(Finished("length"))
    for connection in connections:
        assert b'"text":"b"' in read_all(connection)
        connection.close()


def test_a_client_that_does_not_read_is_dropped(opened: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("app", "answers"):
        monkeypatch.setattr(f"weftlm.serving.{module}.GRACE_SECONDS", 0.0)
    gone = threading.Event()
    lost = _Connection.connection_lost

    def connection_lost(self: Any, exc: Exception | None) -> None:
        lost(self, exc)
        gone.set()

    monkeypatch.setattr(_Connection, "connection_lost", connection_lost)
    text = "x" * 10_000
    engine = FakeEngine(opened, lambda *_: [*(Token(65, text) for _ in range(2_000)), Finished("length")])
    with (
        serving({"tiny": engine}, ServeConfig(timeout_seconds=0.5, intake_seconds=0.5)) as web,
        web.connect() as connection,
    ):
        connection.sendall(request_of(stream=True))
        engine.wait_for_request()
        assert gone.wait(10), "the connection was kept"
        received = read_all(connection)
        assert 0 < len(received) < 2_000 * 10_000
        assert b"[DONE]" not in received


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /" + b"a" * 2_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=lambda sent: repr(sent[:24]),
)
def test_what_is_no_http_is_refused(web: Web, sent: bytes) -> None:
    with web.connect() as connection:
        connection.sendall(sent)
        received = read_all(connection)
        assert received.startswith(b"HTTP/1.1 400 ") or not received, "reset, when more came than was read"


def test_nonsense_after_a_request_does_not_disturb_it(web: Web, engine: FakeEngine) -> None:
    with web.connect() as connection:
        connection.sendall(request_of().replace(b"Connection: close\r\n", b""))
        ticket = engine.wait_for_request()
        connection.sendall(b"\x00nonsense\r\n\r\n")
        ticket.say(Token(65, "b"))
        ticket.say(Finished("length"))
        received = read_all(connection)
        assert received.startswith(b"HTTP/1.1 200 ")
        assert b'"text":"b"' in received


def test_a_body_that_is_too_large_is_answered_though_it_is_still_sent(engine: FakeEngine) -> None:
    with serving({"tiny": engine}, ServeConfig(max_body_bytes=1_000)) as web, web.connect() as connection:
        connection.sendall(request_of(prompt="x" * 3_000_000))
        assert error_in(read_all(connection), 413)["code"] == "body_too_large"
    assert engine.tickets == []


def test_slow_senders(engine: FakeEngine) -> None:
    with serving({"tiny": engine}, ServeConfig(intake_seconds=0.2)) as web:
        with web.connect() as head:
            head.sendall(b"POST /v1/comp")
            assert read_all(head) == b""
        with web.connect() as silent:
            assert read_all(silent) == b""
        with web.connect() as body:
            body.sendall(request_of()[:-5])
            assert error_in(read_all(body), 408)["code"] == "slow_body"


def test_a_server_that_stops_ends_what_runs(engine: FakeEngine) -> None:
    with serving({"tiny": engine}) as web, web.connect() as begun, web.connect() as waiting, web.connect() as idle:
        begun.sendall(request_of(stream=True))
        engine.wait_for_request().say(Token(65, "a"))
        received = read_until(begun, b"data: ")
        waiting.sendall(request_of())
        engine.wait_for_request()
        idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        read_until(idle, b'{"status":"ok"}')
        web.stop()
        received += read_all(begun)
        assert b'"finish_reason":"cancelled"' in received
        assert b"data: [DONE]" in received
        assert error_in(read_all(waiting), 503)["code"] == "stopping"
        assert read_all(idle) == b""
    assert engine.running == []


def test_the_tests_own_server_listens_on_a_free_port(opened: OpenModel) -> None:
    engine = FakeEngine(opened, words(opened))
    with serving({"a": engine}) as first, serving({"b": engine}) as second:
        assert first.address != second.address
        with second.connect() as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b'"id":"b"' in read_all(connection)


def test_listening() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert address_of(listener) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"port {port} cannot be listened on"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="port 0 cannot be listened on"):
        listen("no.such.host.invalid", 0)


def test_which_hosts_are_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("192.0.2.1")
    names = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 0)) for address in ("127.0.0.1", "192.0.2.1")]
    monkeypatch.setattr(server_module.socket, "getaddrinfo", lambda *_, **__: names)
    assert not is_loopback("both"), "a name that also has an address others reach"


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert keys_from_environment() == ()
    monkeypatch.setenv(KEYS_VARIABLE, " one, two ,")
    assert keys_from_environment() == ("one", "two")
    for wrong in ("", " , "):
        monkeypatch.setenv(KEYS_VARIABLE, wrong)
        with pytest.raises(ConfigError, match="holds no key"):
            keys_from_environment()
    monkeypatch.setenv(KEYS_VARIABLE, "one,sécret")
    with pytest.raises(ConfigError, match="key 2") as caught:
        keys_from_environment()
    assert "cret" not in str(caught.value)

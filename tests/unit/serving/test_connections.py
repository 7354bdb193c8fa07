"""Connections: a deadline in every state, limits on their number, strict framing, quiet logs."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.fake_engine import FakeEngine
from support.served import write_model
from support.web import Web, serving

from weftlm.pipeline.any_model import OpenModel, open_model
from weftlm.serving.request import Finished, Token
from weftlm.serving.serve_config import ServeConfig

SHORT = 0.3


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    return open_model(write_model(tmp_path_factory.mktemp("served"), "plain"))


def post(body: bytes, *headers: bytes, length: int | None = None) -> bytes:
    lines = [
        b"POST /v1/completions HTTP/1.1", b"Host: localhost", b"Content-Type: application/json",
        b"Content-Length: %d" % (len(body) if length is None else length), *headers,
    ]  # fmt: skip
    return b"\r\n".join([*lines, b"", b""]) + body


def asked(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": "the sea", "max_tokens": 8, **fields}).encode()


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
LARGE = "x" * 400_000
STATES: dict[str, tuple[list[bytes], bytes]] = {
    # what is sent, and what is sent again and again after it
    "accepted": ([], b""),
    "head": ([b"POST /v1/comp"], b"l"),
    "body": ([post(b"{", length=1_000)], b" "),
    "body in chunks": ([post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")], b"1\r\n \r\n"),
    "answered before its body": ([post(b"", length=1_000).replace(b"/v1/completions", b"/nowhere")], b" "),
    "too large": ([post(b"", length=10**9)], b" "),
    "no key needed, method refused": ([post(b"", length=1_000).replace(b"POST", b"PUT")], b" "),
    "waiting for 100-continue": ([post(b"", b"Expect: 100-continue", length=1_000)], b" "),
    "idle": ([HEALTH], b""),
    "idle, then a byte": ([HEALTH], b"G"),
    "empty lines": ([HEALTH], b"\r\n"),
    "answer awaited": ([post(asked())], b"x"),
    "stream not read": ([post(asked(stream=True, user="large"))], b""),
    "answer not read": ([post(asked(user="large"))], b""),
    "last answer not read": ([post(asked(user="large"), b"Connection: close")], b""),
    "refused": ([b"hello\r\n\r\n"], b"x"),
    "upgrade": ([HEALTH[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"], b"x"),
}


@pytest.mark.parametrize("state", STATES)
def test_no_state_of_a_connection_lasts(
    opened: OpenModel, state: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("app", "answers"):
        monkeypatch.setattr(f"weftlm.serving.{module}.GRACE_SECONDS", 0.1)
    engine = FakeEngine(
        opened, (lambda *_: [*[Token(65, LARGE)] * 30, Finished("length")]) if "read" in state else None
    )
    config = ServeConfig(intake_seconds=SHORT, timeout_seconds=SHORT)
    sent, again = STATES[state]
    with serving({"tiny": engine}, config) as web:
        with web.connect() as connection:
            for piece in sent:
                connection.sendall(piece)
            wait_until(lambda: not web.server.server_state.connections, lambda: trickle(connection, again))
        with web.connect() as other:
            other.sendall(HEALTH)
            assert other.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert [record for record in caplog.records if record.exc_info] == [], "clients cause no tracebacks"


def trickle(connection: socket.socket, piece: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(piece)


def wait_until(done: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    time.sleep(0.05)
    while not done():
        assert time.monotonic() < end, "it did not come"
        meanwhile()
        time.sleep(0.02)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    try:
        while piece := connection.recv(1 << 16):
            received += piece
    except ConnectionResetError:
        pass
    return received


def test_connections_are_limited_and_places_come_back(opened: OpenModel) -> None:
    with serving({"tiny": FakeEngine(opened)}, ServeConfig(max_connections=3)) as web:
        connections = web.server.server_state.connections
        held = [web.connect() for _ in range(6)]
        wait_until(lambda: len(connections) == 6)
        with web.connect() as further:
            assert read_all(further) == b"", "twice as many, and the connection is closed"
        held[0].sendall(HEALTH)
        assert held[0].recv(4096).startswith(b"HTTP/1.1 503 ")
        while len(held) > 2:
            held.pop(0).close()
        wait_until(lambda: len(connections) == 2)
        held[0].sendall(HEALTH)
        assert held[0].recv(4096).startswith(b"HTTP/1.1 200 ")
        for connection in held:
            connection.close()


@pytest.fixture(scope="module")
def web(opened: OpenModel) -> Iterator[Web]:
    with serving({"tiny": FakeEngine(opened, lambda *_: [Token(65, "b"), Finished("length")])}) as web:
        yield web


BODY = asked()
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SIZE = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
AMBIGUOUS = {
    "length and chunked": HEAD + SIZE + CHUNKED + b"\r\n" + CHUNKS,
    "chunked and length": HEAD + CHUNKED + SIZE + b"\r\n" + CHUNKS,
    "two different lengths": HEAD + SIZE + b"content-length: 3\r\n\r\n" + BODY,
    "signed length": HEAD + b"Content-Length: +%d\r\n\r\n" % len(BODY) + BODY,
    "negative length": HEAD + b"Content-Length: -1\r\n\r\n" + BODY,
    "hexadecimal length": HEAD + b"Content-Length: 0x10\r\n\r\n" + BODY,
    "length too long": HEAD + b"Content-Length: 1%s\r\n\r\n" % (b"0" * 30) + BODY,
    "bare CR": HEAD + SIZE + b"X-A: b\rc\r\n\r\n" + BODY,
    "space before colon": HEAD + b"Content-Length : %d\r\n\r\n" % len(BODY) + BODY,
    "tab before colon": HEAD + SIZE + b"Transfer-Encoding\t: chunked\r\n\r\n" + BODY,
    "no colon": HEAD + SIZE + b"X-A\r\n\r\n" + BODY,
    "empty name": HEAD + SIZE + b": a\r\n\r\n" + BODY,
    "NUL in a value": HEAD + SIZE + b"X-A: \x00\r\n\r\n" + BODY,
    "two chunked": HEAD + CHUNKED * 2 + b"\r\n" + CHUNKS,
    "chunked, chunked": HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + CHUNKS,
    "gzip, chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS,
    "identity": HEAD + b"Transfer-Encoding: identity\r\n\r\n" + CHUNKS,
    "xchunked": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKS,
    "chunk size with sign": HEAD + CHUNKED + b"\r\n+5\r\nabcde\r\n0\r\n\r\n",
    "chunk size with 0x": HEAD + CHUNKED + b"\r\n0x5\r\nabcde\r\n0\r\n\r\n",
    "chunk size too long": HEAD + CHUNKED + b"\r\n" + b"f" * 30 + b"\r\nabc",
    "chunk longer than said": HEAD + CHUNKED + b"\r\n3\r\nabcde\r\n0\r\n\r\n",
    "chunk ended by LF": HEAD + CHUNKED + b"\r\n5\r\nabcde\n0\r\n\r\n",
    "two hosts": HEAD + b"Host: other\r\n" + SIZE + b"\r\n" + BODY,
    "no host": HEAD.replace(b"Host: localhost\r\n", b"") + SIZE + b"\r\n" + BODY,
    "many headers": HEAD + SIZE + b"X-A: a\r\n" * 20_000 + b"\r\n" + BODY,
}


@pytest.mark.parametrize("shape", AMBIGUOUS)
def test_what_two_servers_may_read_differently_is_refused(web: Web, shape: str) -> None:
    with web.connect() as connection:
        trickle(connection, AMBIGUOUS[shape] + HEALTH)
        received = read_all(connection)
    assert received.count(b"HTTP/1.1 ") == 1, "what follows is no request of its own"
    assert received.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 ")), received[:300]


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (HEAD + SIZE + b"\r\n" + BODY, [200]),
        (HEAD + CHUNKED + b"\r\n" + CHUNKS, [200]),
        (HEAD + CHUNKED + b"\r\n" + CHUNKS.replace(b"\r\n", b";a=b\r\n", 1), [200]),
        (HEALTH * 3, [200, 200, 200]),
        (HEALTH.replace(b"GET", b"HEAD"), [405]),
        (HEALTH.replace(b"GET", b"OPTIONS"), [405]),
        (HEALTH.replace(b"/1.1", b"/1.0"), [200]),
        (HEALTH.replace(b"/healthz", b"http://localhost/healthz"), [404]),
        (HEALTH.replace(b"/healthz", b"*"), [404]),
        (HEALTH.replace(b"/healthz", b"/page/../../../etc/passwd"), [404]),
        (HEALTH.replace(b"/healthz", b"/page/%2e%2e%2f%2e%2e%2fetc%2fpasswd"), [404]),
        (HEALTH.replace(b"/healthz", b"/page/..%5cserver.py"), [404]),
        (HEALTH.replace(b"/healthz", b"/%00%0d%0a"), [404]),
        (HEAD + SIZE + b"Expect: 100-continue\r\n\r\n" + BODY, [200]),
        (HEALTH + HEAD + SIZE + b"\r\n" + BODY + HEALTH, [200, 200, 200]),
    ],
    ids=lambda value: repr(value[:50]) if isinstance(value, bytes) else None,
)
def test_unusual_requests_are_answered_in_order(web: Web, sent: bytes, statuses: list[int]) -> None:
    with web.connect() as connection:
        connection.sendall(sent)
        connection.settimeout(1.0)
        received = b""
        try:
            while piece := connection.recv(1 << 16):
                received += piece
        except TimeoutError:
            pass
    found = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", received)]
    assert [status for status in found if status != 100] == statuses, received

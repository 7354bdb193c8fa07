"""Connections: a deadline in every state, limits on their number, strict framing, bounded logs."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import resource
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.fake_engine import FakeEngine
from support.served import write_model
from support.web import Web, serving

from weftlm.pipeline.any_model import OpenModel, open_model
from weftlm.serving import connections as module
from weftlm.serving.connections import Admission, SparseLog, client_of
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
def test_no_state_of_a_connection_lasts(opened: OpenModel, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER_SECONDS", SHORT)
    monkeypatch.setattr(module, "ANSWER_GRACE_SECONDS", SHORT)
    monkeypatch.setattr("weftlm.serving.answers.GRACE_SECONDS", 0.1)
    engine = FakeEngine(
        opened, (lambda *_: [*[Token(65, LARGE)] * 30, Finished("length")]) if "read" in state else None
    )
    config = ServeConfig(intake_seconds=SHORT, timeout_seconds=SHORT, keep_alive_seconds=SHORT)
    sent, again = STATES[state]
    with serving({"tiny": engine}, config) as web:
        with web.connect() as connection:
            for piece in sent:
                connection.sendall(piece)
            wait_until(lambda: admission(web).open.total() == 0, lambda: trickle(connection, again))
        with web.connect() as other:
            other.sendall(HEALTH)
            assert other.recv(4096).startswith(b"HTTP/1.1 200 ")


def admission(web: Web) -> Admission:
    return web.server.config.http_protocol_class.admission  # type: ignore[union-attr, return-value]


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


def error_of(response: bytes) -> tuple[int, str]:
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def read_all(connection: socket.socket) -> bytes:
    received = b""
    try:
        while piece := connection.recv(1 << 16):
            received += piece
    except ConnectionResetError:
        pass
    return received


@pytest.mark.parametrize(
    ("limits", "status"), [({"max_connections": 3}, 503), ({"max_connections_per_client": 3}, 429)]
)
def test_connections_are_limited_and_places_come_back(opened: OpenModel, limits: dict[str, int], status: int) -> None:
    with serving({"tiny": FakeEngine(opened)}, ServeConfig(**limits)) as web:
        held = [web.connect() for _ in range(3)]
        wait_until(lambda: admission(web).open.total() == 3)
        with web.connect() as further:
            assert error_of(read_all(further)) == (status, "too_many_connections")
        held.pop().close()
        wait_until(lambda: admission(web).open.total() == 2)
        with web.connect() as further:
            further.sendall(HEALTH)
            assert further.recv(4096).startswith(b"HTTP/1.1 200 ")
        for connection in held:
            connection.close()


def test_clients_are_counted_by_address_and_network() -> None:
    assert client_of("192.0.2.1") == client_of("::ffff:192.0.2.1") == "192.0.2.1"
    assert client_of("2001:db8::1") == client_of("2001:db8::ffff:2") != client_of("2001:db8:0:1::1")
    admission = Admission(ServeConfig(max_connections=3, max_connections_per_client=2))
    assert [admission.enter(client) is None for client in ("a", "a", "a", "b", "b")] == [True, True, False, True, False]
    admission.leave("a")
    assert admission.enter("b") is None


def test_a_server_without_descriptors_comes_back(opened: OpenModel, caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving({"tiny": FakeEngine(opened)}) as web:
        host, port = web.address.removeprefix("http://").split(":")
        waiting = [socket.socket() for _ in range(40)]
        highest = max(each.fileno() for each in waiting)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        try:
            for each in waiting:
                each.settimeout(5)
                each.connect((host, int(port)))
            time.sleep(0.2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        waiting[-1].sendall(HEALTH)
        assert waiting[-1].recv(4096).startswith(b"HTTP/1.1 200 ")
        for each in waiting:
            each.close()
    assert 1 <= sum("out of system resource" in record.getMessage() for record in caplog.records) <= 10


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
    "two equal lengths": HEAD + SIZE * 2 + b"\r\n" + BODY,
    "two different lengths": HEAD + SIZE + b"content-length: 3\r\n\r\n" + BODY,
    "lengths in a list": HEAD + b"Content-Length: %d, %d\r\n\r\n" % (len(BODY), len(BODY)) + BODY,
    "signed length": HEAD + b"Content-Length: +%d\r\n\r\n" % len(BODY) + BODY,
    "negative length": HEAD + b"Content-Length: -1\r\n\r\n" + BODY,
    "hexadecimal length": HEAD + b"Content-Length: 0x10\r\n\r\n" + BODY,
    "length too long": HEAD + b"Content-Length: 1%s\r\n\r\n" % (b"0" * 30) + BODY,
    "folded line": HEAD + SIZE + b"X-A: b\r\n c\r\n\r\n" + BODY,
    "folded chunked": HEAD + SIZE + b"X-A: b\r\n\tTransfer-Encoding: chunked\r\n\r\n" + BODY,
    "bare LF": (HEAD + SIZE + b"\r\n").replace(b"\r\n", b"\n") + BODY,
    "one bare LF": HEAD + SIZE[:-2] + b"\n\r\n" + BODY,
    "bare CR": HEAD + SIZE + b"X-A: b\rc\r\n\r\n" + BODY,
    "space before colon": HEAD + b"Content-Length : %d\r\n\r\n" % len(BODY) + BODY,
    "tab before colon": HEAD + SIZE + b"Transfer-Encoding\t: chunked\r\n\r\n" + BODY,
    "space before name": HEAD[:-2] + b"\r\n " + SIZE + b"\r\n" + BODY,
    "no colon": HEAD + SIZE + b"X-A\r\n\r\n" + BODY,
    "empty name": HEAD + SIZE + b": a\r\n\r\n" + BODY,
    "NUL in a value": HEAD + SIZE + b"X-A: \x00\r\n\r\n" + BODY,
    "two chunked": HEAD + CHUNKED * 2 + b"\r\n" + CHUNKS,
    "chunked, chunked": HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + CHUNKS,
    "gzip, chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS,
    "identity": HEAD + b"Transfer-Encoding: identity\r\n\r\n" + CHUNKS,
    "xchunked": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKS,
    "chunked in HTTP/1.0": (HEAD + CHUNKED + b"\r\n").replace(b"/1.1", b"/1.0") + CHUNKS,
    "chunk size with sign": HEAD + CHUNKED + b"\r\n+5\r\nabcde\r\n0\r\n\r\n",
    "chunk size with 0x": HEAD + CHUNKED + b"\r\n0x5\r\nabcde\r\n0\r\n\r\n",
    "chunk size too long": HEAD + CHUNKED + b"\r\n" + b"f" * 30 + b"\r\nabc",
    "chunk longer than said": HEAD + CHUNKED + b"\r\n3\r\nabcde\r\n0\r\n\r\n",
    "chunk ended by LF": HEAD + CHUNKED + b"\r\n5\r\nabcde\n0\r\n\r\n",
    "chunk extension too long": HEAD + CHUNKED + b"\r\n5;" + b"a" * 70_000 + b"\r\nabcde\r\n0\r\n\r\n",
    "trailers": HEAD + CHUNKED + b"\r\n" + CHUNKS[:-2] + b"Content-Length: 3\r\n\r\n",
    "two hosts": HEAD + b"Host: other\r\n" + SIZE + b"\r\n" + BODY,
    "no host": HEAD.replace(b"Host: localhost\r\n", b"") + SIZE + b"\r\n" + BODY,
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "huge header": HEAD + SIZE + b"X-A: " + b"a" * 100_000 + b"\r\n\r\n" + BODY,
    "many headers": HEAD + SIZE + b"X-A: a\r\n" * 20_000 + b"\r\n" + BODY,
}


@pytest.mark.parametrize("shape", AMBIGUOUS)
def test_what_two_servers_may_read_differently_is_refused(web: Web, shape: str) -> None:
    with web.connect() as connection:
        trickle(connection, AMBIGUOUS[shape] + HEALTH)
        received = read_all(connection)
    assert received.count(b"HTTP/1.1 ") == 1, "what follows is no request of its own"
    assert error_of(received)[0] in (400, 413), received[:300]
    if b"invalid_http" in received:
        assert b"connection: close" in received


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (HEAD + SIZE + b"\r\n" + BODY, [200]),
        (HEAD + CHUNKED + b"\r\n" + CHUNKS, [200]),
        (HEAD + CHUNKED + b"\r\n" + CHUNKS.replace(b"\r\n", b";a=b\r\n", 1), [200]),
        (HEALTH * 3, [200, 200, 200]),
        (b"\r\n" + HEALTH, [400]),
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
        connection.settimeout(0.3)
        received = b""
        try:
            while piece := connection.recv(1 << 16):
                received += piece
        except TimeoutError:
            pass
    found = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", received)]
    assert [status for status in found if status != 100] == statuses, received


def test_lines_of_a_kind_are_bounded_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    log, sparse = logging.getLogger("tests.sparse"), SparseLog(lines=3, seconds=0.1)
    log.addFilter(sparse)
    try:
        for number in range(50):
            log.warning("a client did %d", number)
        log.warning("another kind")
        assert len(caplog.records) == 4
        time.sleep(0.11)
        log.warning("a client did %d", 50)
        assert "a client did 50 [47 lines" in caplog.records[-1].getMessage()
    finally:
        log.removeFilter(sparse)

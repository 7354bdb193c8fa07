"""Work that what clients and model folders bring may make long, in processes that are killed when it does.

Two jobs go to a process: a large body is parsed and checked, and a chat template, which is code from a model's folder,
writes messages out. Both hold Python's lock for as long as they take, which would keep every other request waiting in
a thread of the server. A process has `BODY_SECONDS` or `TEMPLATE_SECONDS` for a job and `MEMORY_BYTES` of memory;
after that it is gone, and the next job gets a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from weftlm.errors import ConfigError
from weftlm.serving.api_errors import ApiError
from weftlm.serving.limits import checked
from weftlm.serving.schemas import Bounds, Forms, flat

try:
    import resource
except ModuleNotFoundError:  # no POSIX
    resource = None  # type: ignore[assignment]

COUNT = 2
"""Processes, and threads of the server that drive them."""
START_SECONDS = 120.0
BODY_SECONDS = 10.0
TEMPLATE_SECONDS = 2.0
MEMORY_BYTES = 2 << 30
MAX_WRITTEN = 8_000_000
"""Characters a chat template may write."""

T = TypeVar("T")


class Workers:
    """Threads of the server, each with a process of its own that begins at its first job."""

    def __init__(self, count: int = COUNT) -> None:
        self._executor = ThreadPoolExecutor(count, "weftlm-intake")
        self._own = threading.local()
        self._all: list[Worker] = []

    async def run(self, work: Callable[[Worker], T]) -> T:
        """Do some work in a thread, with that thread's process at hand."""
        try:
            doing = asyncio.get_running_loop().run_in_executor(self._executor, lambda: work(self._worker()))
        except RuntimeError:  # after `close`
            raise ApiError(503, "the server stops", code="stopping") from None
        return await doing

    def close(self) -> None:
        """End what runs and begin nothing more."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._all):
            worker.close()

    def _worker(self) -> Worker:
        if not hasattr(self._own, "worker"):
            self._own.worker = Worker()
            self._all.append(self._own.worker)
        worker: Worker = self._own.worker
        return worker


class Worker:
    """One process and the channel to it; to be used by one thread."""

    def __init__(self) -> None:
        self._channel: Connection | None = None
        self._end: Callable[[], object] = lambda: None
        self._closed = False

    def check(self, raw: bytes, kind: str, bounds: Sequence[Bounds]) -> dict[str, Any]:
        """Parse a body and check it; its fields, as `schemas.flat` gives them.

        Raises:
            ApiError: it is wrong, or takes too long.
        """
        job = {"job": "check", "kind": kind, "bounds": [vars(each) for each in bounds]}
        try:
            answer = self._ask(job, raw, BODY_SECONDS)
        except TimeoutError:
            raise ApiError(400, "the body takes too long to read; send a simpler one", code="invalid_body") from None
        if (error := answer.get("error")) is not None:
            raise ApiError(error.pop("status"), **error)
        value: dict[str, Any] = answer["value"]
        return value

    def render(self, template: str, tokens: Mapping[str, Any], messages: Sequence[Mapping[str, str]]) -> str:
        """What a chat template makes of messages.

        Raises:
            ConfigError: the template refuses the messages.
            ApiError: it does not end, or writes too much.
        """
        job = {"job": "render", "template": template, "tokens": tokens, "messages": messages}
        try:
            answer = self._ask(job, b"", TEMPLATE_SECONDS)
        except TimeoutError:
            raise ApiError(
                500,
                f"the model's chat template did not end within {TEMPLATE_SECONDS:g} s; the model needs another one",
                code="chat_template_failed",
            ) from None
        if "refused" in answer:
            raise ConfigError(f"messages: the model's chat template refuses them: {answer['refused']}")
        return str(answer["text"])

    def close(self) -> None:
        """End the process, and begin no other."""
        self._closed = True
        self._end()

    def _ask(self, job: Mapping[str, Any], raw: bytes, seconds: float) -> dict[str, Any]:
        if self._channel is None:
            self._channel = self._start()
        channel = self._channel
        try:
            channel.send_bytes(json.dumps({**job, "seconds": seconds}).encode())
            channel.send_bytes(raw)
            if channel.poll(seconds + 1.0):
                answer: dict[str, Any] = json.loads(channel.recv_bytes())
                return answer
        except (EOFError, OSError):
            pass
        self._end()
        self._channel = None
        self._refuse_closed()
        raise TimeoutError

    def _start(self) -> Connection:
        self._refuse_closed()
        channel, theirs = Pipe()
        # The folder the command was called in is no place to import from.
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        code = f"from weftlm.serving.workers import serve; serve({theirs.fileno()})"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=environment,
        )
        theirs.close()
        self._end = weakref.finalize(self, _stop, process, channel)
        if self._closed or not _answers(channel):
            self._end()
            self._refuse_closed()
            raise ApiError(500, "the process that reads requests did not start", code="server_error")
        return channel

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ApiError(503, "the server stops", code="stopping")


def _answers(channel: Connection) -> bool:
    try:
        return channel.poll(START_SECONDS) and channel.recv_bytes() == b"ready"
    except (EOFError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes], channel: Connection) -> None:
    process.kill()
    process.wait()
    channel.close()


# ------------------------------------------------------------------------------------------------- in the other process


def serve(descriptor: int) -> None:
    """Do jobs until the channel is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if resource is not None:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    channel = Connection(descriptor)
    channel.send_bytes(b"ready")
    with contextlib.suppress(EOFError, OSError):
        while True:
            job, raw = json.loads(channel.recv_bytes()), channel.recv_bytes()
            signal.setitimer(signal.ITIMER_REAL, job["seconds"])  # it ends the process, whatever runs in it
            try:
                answer = _check(job, raw) if job["job"] == "check" else _render(job)
            except ApiError as error:
                answer = {
                    "error": {
                        "status": error.status_code,
                        "message": error.message,
                        "param": error.param,
                        "code": error.code,
                    }
                }
            written = json.dumps(answer).encode()
            signal.setitimer(signal.ITIMER_REAL, 0)
            channel.send_bytes(written)


def _check(job: Mapping[str, Any], raw: bytes) -> dict[str, Any]:
    forms = Forms([Bounds(**each) for each in job["bounds"]])
    try:
        return {"value": flat(checked(raw, lambda value: forms.of(job["kind"], value)))}
    except MemoryError:
        raise ApiError(400, "the body takes too much memory to read; send a simpler one", code="invalid_body") from None


def _render(job: Mapping[str, Any]) -> dict[str, Any]:
    try:
        template = _environment().from_string(job["template"])
        parts: list[str] = []
        size = 0
        for part in template.generate(messages=job["messages"], add_generation_prompt=True, **job["tokens"]):
            size += len(part)
            if size > MAX_WRITTEN:
                return {"refused": f"it writes more than {MAX_WRITTEN:,} characters"}
            parts.append(part)
    except Exception as error:  # noqa: BLE001 (a template may do anything)
        return {"refused": f"{str(error)[:500] or type(error).__name__}"}
    return {"text": "".join(parts)}


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said, which changes nothing that is written."""

    tags = {"generation"}  # noqa: RUF012 (as jinja has it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """jinja's namespace without names that reach into Python."""

    def __init__(self, /, *args: Any, **fields: Any) -> None:
        held = dict(*args, **fields)
        for name in held:
            _refuse_private(name)
        super().__init__(held)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.TemplateError(f"a namespace has no {name!r}")


def _environment() -> jinja2.Environment:
    """jinja as chat templates expect it."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals.pop("lipsum")
    made.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().astimezone().strftime(form),
        "dict": lambda *args, **fields: dict(*args, **fields),  # noqa: PLW0108 (without the attributes of the type)
        "namespace": _Namespace,
    }
    return made

"""What a request must pass before it is read: a host, a key, a size, a time to arrive; and how its JSON is read."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import math
from collections.abc import Callable, Sequence
from email.message import Message as Headers
from typing import Any, Never, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weftlm.serving.api_errors import ApiError, invalid
from weftlm.serving.serve_config import host_name

OPEN_PATHS = frozenset({"/", "/healthz"})
"""Answered without a key: whether the server runs, and the page, which holds no data and asks for the key."""

OPEN_FOLDER = "/page/"
"""The page's files, open as the page is."""

SMALL_BODY_BYTES = 65_536
"""Bodies up to this size are parsed and checked on the event loop: whatever they hold takes a few milliseconds."""

M = TypeVar("M", bound=BaseModel)


def is_open(path: str) -> bool:
    """Whether a path is answered without a key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


class Hosts:
    """ASGI middleware that answers requests made under some names alone: localhost, any address, and those given.

    A page from elsewhere can have its own name point to this machine and so pass for a page of this server (DNS
    rebinding). What its browser sends then still carries that name; an address cannot be made to point elsewhere.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str] | None) -> None:
        self.app = app
        self.names = None if names is None else frozenset(host_name(name) for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.names is None:
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
        name = host_name(given)
        if name in self.names or _is_local(name):
            await self.app(scope, receive, send)
            return
        error = ApiError(
            403,
            f"the request is for the host {name!r:.100}, which is not one of this server's names; start it with "
            "--allow-host for each name it is reached under",
            code="host_not_allowed",
        )
        await error.response()(scope, receive, send)


def _is_local(name: str) -> bool:
    """Whether a name can only mean an address or this machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Keys:
    """ASGI middleware that asks for a key: `Authorization: Bearer KEY`.

    Every path but `OPEN_PATHS` and those in `OPEN_FOLDER` is covered, wherever the application is mounted. All keys are
    compared in full, in a time that does not tell which fits.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self.keys = [key.encode("utf-8") for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.keys or is_open(_path_inside(scope)) or self._known(scope):
            await self.app(scope, receive, send)
            return
        error = ApiError(
            401,
            "no valid API key came; send one as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        fits = [hmac.compare_digest(key.strip(), known) for known in self.keys]
        return scheme.lower() == b"bearer" and any(fits)


def _path_inside(scope: Scope) -> str:
    """The path below the place where the application is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


class Intake:
    """ASGI middleware that bounds a body's size, the time it may take to arrive, and the time of its answer.

    A body without a declared length is bounded too. Reading one beyond the limits raises an `ApiError`: 413 or 408. An
    answer that has not begun in time is replaced by 408.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, intake_seconds: float, answer_seconds: float) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.intake_seconds = intake_seconds
        self.answer_seconds = answer_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if declared.isdigit() and int(declared[:20]) > self.max_body_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        deadline = asyncio.get_running_loop().time() + self.intake_seconds
        size, complete, begun = 0, False, False

        async def bounded() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body did not arrive within {self.intake_seconds:g} s",
                    code="slow_body",
                    headers={"Connection": "close"},
                ) from None
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if complete:
                    limit.reschedule(asyncio.get_running_loop().time() + self.answer_seconds)
                if size > self.max_body_bytes:
                    raise self._too_large()
            return message

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            async with asyncio.timeout(None) as limit:
                await self.app(scope, bounded, noted)
        except TimeoutError:
            if begun or not limit.expired():
                raise
            late = ApiError(408, f"no answer was ready within {self.answer_seconds:g} s; ask for less", code="timeout")
            await late.response()(scope, receive, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_body_bytes:,} bytes; send less", code="body_too_large")


async def read_json(request: Request, model: type[M]) -> M:
    """Read a request's body as JSON and check it, at once; for routes whose bodies are small.

    Raises:
        ApiError: 413 for more than `SMALL_BODY_BYTES`; else as `read_body` and `checked`.
    """
    raw = await read_body(request)
    if len(raw) > SMALL_BODY_BYTES:
        raise ApiError(413, f"the body is larger than {SMALL_BODY_BYTES:,} bytes; send less", code="body_too_large")
    return checked(raw, lambda _: model)


async def read_body(request: Request) -> bytes:
    """A request's body.

    Raises:
        ApiError: 415 for another content type than JSON in UTF-8.
    """
    _check_content_type(request.headers.get("content-type"))
    return await request.body()


def checked(raw: bytes, model_of: Callable[[Any], type[M]]) -> M:
    """Parse a body and check it.

    Args:
        raw: the body.
        model_of: chooses the model by the parsed value.
    Raises:
        ApiError: 400 for what is no JSON in UTF-8, or not what the model allows.
    """
    value = parse_json(raw)
    model = model_of(value)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_context=False), model.model_fields) from None


def _check_content_type(given: str | None) -> None:
    headers = Headers()
    if given is not None:
        headers["content-type"] = given.encode("ascii", "replace").decode("ascii").replace("\n", " ").replace("\r", " ")
    kind = headers.get_content_type() if given is not None else "none"
    charset = str(headers.get_param("charset", "utf-8")).lower()
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        raise ApiError(415, f"the content type is {given!r:.100}; send application/json", code="unsupported_media_type")
    if charset not in ("utf-8", "utf8"):
        raise ApiError(415, f"the charset is {charset!r:.100}; send utf-8", code="unsupported_media_type")


def parse_json(raw: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity, no number too large to hold.

    Raises:
        ApiError: 400, with what is wrong.
    """
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 (byte {error.start})"
    except RecursionError:
        problem = "is nested too deeply"
    except ValueError as error:
        problem = f"is not valid JSON: {error}"
    raise ApiError(400, f"the body {problem}", code="invalid_json")


def _no_constant(name: str) -> Never:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value

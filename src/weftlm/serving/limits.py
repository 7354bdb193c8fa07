"""What a request must pass before it is read: a host, a key, a size, a time to arrive; and how its JSON is parsed."""

from __future__ import annotations

import asyncio
import gc
import hmac
import ipaddress
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weftlm.serving.api_errors import ApiError
from weftlm.serving.serve_config import ServeConfig, host_name

OPEN_PATHS = frozenset({"/", "/healthz"})
"""Paths answered without a key: the health check, and the page, which holds no data and asks for the key."""
MAX_STRINGS = 20_000
"""Maximum number of strings in a JSON body, names of fields included: each takes much longer to read than a byte."""
MAX_BRACKETS = 100_000
"""Maximum number of opening brackets in a JSON body, texts included; each may begin a list."""
OPEN_FOLDER = "/page/"
"""The page's files, open as the page is."""


class Guard:
    """ASGI middleware that refuses requests before their body is read, and bounds its size and every wait.

    - Host: a page from elsewhere can have its own name point to this machine and so pass for a page of this server (DNS
      rebinding); what its browser sends still carries that name. Addresses and localhost cannot be made to point
      elsewhere and always pass.
    - Key: `Authorization: Bearer KEY`, compared in constant time, for every path but the page and the health check.
    - Framing: a length beside chunks, which a proxy may read in another way, closes the connection.
    - Body: `max_body_bytes`, declared or not, within `intake_seconds`.
    - Answer: begun and sent within `answer_seconds` of the last byte of the body.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, answer_seconds: float) -> None:
        self.app = app
        self.config = config
        self.answer_seconds = answer_seconds
        self.hosts = None if config.hosts is None else frozenset(map(host_name, config.hosts))
        self.keys = [key.get_secret_value().encode() for key in config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if (refused := self._refused(scope)) is not None:
            await refused.response()(scope, receive, send)
            return
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.config.intake_seconds
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
                    f"the body did not arrive within {self.config.intake_seconds:g} s",
                    code="slow_body",
                    headers={"Connection": "close"},
                ) from None
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if complete:
                    limit.reschedule(clock() + self.answer_seconds)
                if size > self.config.max_body_bytes:
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
            if not limit.expired():
                raise
            if not begun:  # else the client does not read its answer: the server closes what is left unfinished
                message = f"no answer was ready within {self.answer_seconds:g} s; ask for less"
                await ApiError(408, message, code="timeout").response()(scope, receive, send)

    def _refused(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        name = host_name(headers.get("host", ""))
        if self.hosts is not None and name not in self.hosts and not _is_local(name):
            return ApiError(
                403,
                f"the request is for the host {name!r:.100}, which is not one of this server's names; start it with "
                "--allow-host for each name it is reached under",
                code="host_not_allowed",
            )
        if self.keys and not _is_open(scope) and not self._known(headers.get("authorization", "")):
            return ApiError(
                401,
                "no valid API key came; send one as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get("content-length", "")
        if length and "transfer-encoding" in headers:
            message = "the request has a Content-Length and a Transfer-Encoding; send one of them"
            return ApiError(400, message, code="invalid_http", headers={"Connection": "close"})
        return self._too_large() if length.isdigit() and int(length[:20]) > self.config.max_body_bytes else None

    def _known(self, given: str) -> bool:
        scheme, _, key = given.partition(" ")
        fits = [hmac.compare_digest(key.strip().encode("latin-1"), known) for known in self.keys]
        return scheme.lower() == "bearer" and any(fits)

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self.config.max_body_bytes:,} bytes; send less"
        return ApiError(413, message, code="body_too_large")


def _is_open(scope: Scope) -> bool:
    """Whether a path, below the place where the application is mounted, is answered without a key."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    inside = path.removeprefix(root) if path.startswith(f"{root}/") else path
    return inside in OPEN_PATHS or inside.startswith(OPEN_FOLDER)


def _is_local(name: str) -> bool:
    """Whether a name can only mean an address or this machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class JsonRoute(APIRoute):
    """A route whose bodies are parsed by pydantic: fast, bounded in depth, without NaN; a small part of a second."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of the route."""
        handler = super().get_route_handler()

        class Strict(Request):
            async def json(self) -> Any:
                body, collected = await self.body(), gc.isenabled()
                strings = (body.count(b'"') - body.count(b'\\"')) // 2
                if strings > MAX_STRINGS or body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
                    message = f"the body holds more than {MAX_STRINGS:,} strings or {MAX_BRACKETS:,} opening brackets"
                    raise ApiError(400, f"{message}; send fewer fields, lists or texts", code="invalid_body")
                gc.disable()  # a list of many lists would be walked again and again while it grows
                try:
                    return from_json(body, allow_inf_nan=False)
                except ValueError as error:
                    raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
                finally:
                    if collected:
                        gc.enable()

        async def strict(request: Request) -> Response:
            return await handler(Strict(request.scope, request.receive))

        return strict

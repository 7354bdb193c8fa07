"""What a request must pass before it is read (a host, a key, a size), and errors in OpenAI's form."""

from __future__ import annotations

import hmac
import reprlib
import time
from collections.abc import Sequence
from http import HTTPMethod, HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weftlm.errors import NumericsError, WeftError
from weftlm.serving.metrics import Metrics
from weftlm.serving.request import EngineClosedError, PromptError, QueueFullError
from weftlm.serving.serve_config import ServeConfig, host_name, ip_of

CLIENT_LEFT = 499
"""Status of a request whose client left before it was answered; counted, and received by no client."""
RETRY_SECONDS = 1
OPEN_PATHS = ("/", "/healthz", "/page/")
"""Paths answered without a key: the health check, and the page with its files, which hold no data and ask for it."""
MAX_BRACKETS = 10_000
"""Maximum number of opening brackets in a body: a list takes much longer to read than a byte."""
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""Headers of every response that has none of its own: the page loads nothing from elsewhere."""
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80
"""Shows what a client sent without reading all of it."""
TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error", 503: "overloaded_error"}


class ApiError(HTTPException):
    """An error for the client: the message may quote any text it sent, `code` is by default the name of the status."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str = "", headers: Any = None
    ) -> None:
        super().__init__(status, message.encode("utf-8", "backslashreplace").decode(), headers)
        self.param = param
        self.code = code or HTTPStatus(status).name.lower()

    def body(self) -> dict[str, dict[str, str | None]]:
        """The body of the response."""
        kind = TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The response."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def add_handlers(app: FastAPI) -> None:
    """Answer every error of an app in OpenAI's form."""

    async def answered(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=CLIENT_LEFT)
        return _api_error(request, error).response()

    for kind in (RequestValidationError, StarletteHTTPException, WeftError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, answered)


def _api_error(request: Request, error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _invalid(error.errors())
        case StarletteHTTPException():
            message = f"{request.method[:20]} {request.url.path[:200]!r}: {error.detail}; see /openapi.json"
            return ApiError(error.status_code, message, headers=error.headers)
        case PromptError():
            field = "messages" if request.url.path.endswith("/chat/completions") else "prompt"
            return ApiError(400, str(error), param=field, code=error.code)
        case QueueFullError():
            message = f"{error}; try again in {RETRY_SECONDS} s"
            return ApiError(429, message, code="queue_full", headers={"Retry-After": str(RETRY_SECONDS)})
        case EngineClosedError():
            return ApiError(503, "the server stops", code="stopping")
        case NumericsError():
            return ApiError(500, str(error), code="generation_failed")
        case WeftError():
            return ApiError(400, str(error), code="refused")
    return ApiError(500, "the server failed; its log says why")


def _invalid(problems: Sequence[Any]) -> ApiError:
    """The first field at fault in a pydantic report, with everything reported about it."""
    places = [[str(part) for part in problem["loc"] if part not in ("body", "path")] for problem in problems]
    first = problems[0]
    field = places[0][0] if places[0] else first.get("ctx", {}).get("name", "")
    if not field:
        return ApiError(400, f"the body must be a JSON object, sent as application/json: {first['msg']}")
    here = [problem["msg"] for problem, place in zip(problems, places, strict=True) if place[:1] == places[0][:1]]
    message = f"{field}: {'; or '.join(dict.fromkeys(here))} (got {SHORT.repr(first.get('input'))})"
    return ApiError(400, message, param=field, code=first["type"])


class Guard:
    """ASGI middleware that refuses requests before their body is read, bounds its size, and counts them.

    - Host: a page from elsewhere can have its own name point to this machine and so pass for a page of this server (DNS
      rebinding); what its browser sends still carries that name. Addresses and localhost cannot be made to point
      elsewhere and always pass.
    - Key: `Authorization: Bearer KEY`, compared in constant time, for every path but the page and the health check.
    - Framing: a length beside chunks, which a proxy may read in another way, closes the connection.
    - Body: `max_body_bytes`, declared or not, and `MAX_BRACKETS`.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics
        self.most = config.max_body_bytes
        self.hosts = None if config.hosts is None else frozenset(map(host_name, config.hosts))
        self.keys = [key.get_secret_value().encode() for key in config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size, brackets, status, start = 0, 0, CLIENT_LEFT, time.perf_counter()

        async def bounded() -> Message:
            nonlocal size, brackets
            message = await receive()
            piece = message.get("body", b"")
            size += len(piece)
            brackets += piece.count(b"[") + piece.count(b"{")
            if size > self.most:
                raise self._too_large()
            if brackets > MAX_BRACKETS:
                raise ApiError(400, f"the body holds more than {MAX_BRACKETS:,} opening brackets", code="invalid_body")
            return message

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status, headers = message["status"], MutableHeaders(scope=message)
                for name, value in PAGE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            with self.metrics.open.track_inprogress():
                refused = self._refused(scope, Headers(scope=scope))
                await (self.app if refused is None else refused.response())(scope, bounded, counted)
        except Exception:
            status = 500
            raise
        finally:  # a route is counted by its template, never by what a client wrote
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in HTTPMethod.__members__ else "other"
            self.metrics.requests.labels(method, route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)

    def _refused(self, scope: Scope, headers: Headers) -> ApiError | None:
        name = host_name(headers.get("host", ""))
        if self.hosts is not None and name not in self.hosts and ip_of(name) is None:
            message = (
                f"the request is for the host {name!r:.100}, which is not one of this server's names; start it with "
                "--allow-host for each name it is reached under"
            )
            return ApiError(403, message, code="host_not_allowed")
        # Where the application is mounted in another, its paths begin after the place of the mount.
        path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
        inside = path.removeprefix(root) if path.startswith(f"{root}/") else path
        is_open = inside in OPEN_PATHS or inside.startswith(OPEN_PATHS[-1])
        if self.keys and not is_open and not self._known(headers.get("authorization", "")):
            message = "no valid API key came; send one as 'Authorization: Bearer KEY'"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "")
        if length and "transfer-encoding" in headers:
            message = "the request has a Content-Length and a Transfer-Encoding; send one of them"
            return ApiError(400, message, code="invalid_http", headers={"Connection": "close"})
        return self._too_large() if length.isdigit() and int(length[:20]) > self.most else None

    def _known(self, given: str) -> bool:
        scheme, _, key = given.partition(" ")
        fits = [hmac.compare_digest(key.strip().encode("latin-1"), known) for known in self.keys]
        return scheme.lower() == "bearer" and any(fits)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.most:,} bytes; send less", code="body_too_large")

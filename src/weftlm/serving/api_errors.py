"""Errors of the API: a status, and a JSON body in OpenAI's form."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from weftlm.errors import ConfigError
from weftlm.serving.request import QueueFullError
from weftlm.serving.schemas import ErrorBody

CLIENT_LEFT = 499
"""Status of a request whose client left before it was answered; counted, and received by no client."""

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80
"""Shows what a client sent without reading all of it."""

TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error", 503: "overloaded_error"}


class ApiError(HTTPException):
    """An error for the client.

    Args:
        status: HTTP status.
        message: What came, what is allowed, what to do.
        param: Field at fault.
        code: Name for programs; that of the status by default.
        headers: Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers=dict(headers) if headers else None)
        self.message = message
        self.param = param
        self.code = code if code is not None else HTTPStatus(status).name.lower()

    def body(self) -> ErrorBody:
        """The body of the response."""
        family = "server_error" if self.status_code >= 500 else "invalid_request_error"
        kind = TYPES.get(self.status_code, family)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The response; a message may quote any text a client sent."""
        message = self.message.encode("utf-8", "backslashreplace").decode()
        body = self.body()
        body["error"]["message"] = message
        return JSONResponse(body, self.status_code, self.headers)


def _invalid(problems: Sequence[Any]) -> ApiError:
    """The first field at fault in a pydantic report, with everything reported about it."""
    places = [[str(part) for part in problem["loc"] if part not in ("body", "path")] for problem in problems]
    first, field = problems[0], places[0][0] if places[0] else ""
    if first["type"] == "unknown_field" and len(places[0]) == 0:
        field = first["ctx"]["name"]
    if not field:
        return ApiError(400, f"the body must be a JSON object, sent as application/json: {first['msg']}")
    here = [problem["msg"] for problem, place in zip(problems, places, strict=True) if place[:1] == places[0][:1]]
    named = {"missing": "missing_field", "unknown_field": "unknown_field", "unsupported_value": "unsupported_value"}
    return ApiError(
        400,
        f"{field}: {'; or '.join(dict.fromkeys(here))} (got {SHORT.repr(first.get('input'))})",
        param=field,
        code=named.get(first["type"], "invalid_value"),
    )


def add_handlers(app: FastAPI) -> None:
    """Answer every error of an app in OpenAI's form."""

    async def answered(request: Request, error: Exception) -> Response:
        match error:
            case ApiError():
                return error.response()
            case RequestValidationError():
                return _invalid(error.errors()).response()
            case StarletteHTTPException():
                path = request.url.path[:200]
                message = f"{request.method[:20]} {path!r}: {error.detail}; see /openapi.json"
                return ApiError(error.status_code, message, headers=error.headers).response()
            case QueueFullError():
                seconds = max(1, round(error.retry_after_s + 0.5))
                headers = {"Retry-After": str(seconds)}
                message = f"{error}; try again in {seconds} s"
                return ApiError(429, message, code="queue_full", headers=headers).response()
            case ConfigError():
                return ApiError(400, str(error), code="refused").response()
            case ClientDisconnect():
                return Response(status_code=CLIENT_LEFT)
        return ApiError(500, "the server failed; its log says why").response()

    kinds = (ApiError, RequestValidationError, StarletteHTTPException, QueueFullError, ConfigError, ClientDisconnect)
    for kind in (*kinds, Exception):
        app.add_exception_handler(kind, answered)

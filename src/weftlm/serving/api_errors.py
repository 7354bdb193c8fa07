"""Errors as the API tells them: a status, and a JSON body in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from weftlm.errors import ConfigError, did_you_mean
from weftlm.serving.request import QueueFullError

ErrorType = Literal[
    "invalid_request_error", "authentication_error", "rate_limit_error", "timeout_error", "overloaded_error",
    "server_error",
]  # fmt: skip


CLIENT_LEFT = 499
"""Status of a request whose client left before it was answered; counted, and received by nobody."""


class ClientLeftError(Exception):
    """The client closed the connection; there is nobody to answer."""


class ErrorDetail(BaseModel):
    """What went wrong.

    Attributes:
        message: what came, what is allowed, what to do.
        type: the family of the error.
        param: the field at fault, dotted; null where there is none.
        code: a name for programs.
    """

    model_config = ConfigDict(extra="forbid")

    message: str
    type: ErrorType
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is no success."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorDetail


class ApiError(HTTPException):
    """An error to be told to the client.

    Attributes:
        message: what came, what is allowed, what to do.
        param: the field at fault.
        code: a name for programs.
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

    def detail_dict(self) -> dict[str, Any]:
        """The inner object of the body."""
        return {"message": self.message, "type": error_type(self.status_code), "param": self.param, "code": self.code}

    def response(self) -> Response:
        """The whole response."""
        return json_response({"error": self.detail_dict()}, self.status_code, self.headers)


def error_type(status: int) -> ErrorType:
    """The family a status belongs to."""
    if status == HTTPStatus.UNAUTHORIZED:
        return "authentication_error"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    if status == HTTPStatus.REQUEST_TIMEOUT:
        return "timeout_error"
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return "overloaded_error"
    return "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII, so that any text a client sent can be quoted back."""
    body = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Response(body, status, dict(headers) if headers else None, media_type="application/json")


def queue_full(error: QueueFullError) -> ApiError:
    """The queue is full: come back later."""
    seconds = max(1, round(error.retry_after_s + 0.5))
    return ApiError(
        429,
        f"{error}; try again in {seconds} s",
        code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


NOT_OFFERED: Mapping[str, str] = {
    "audio": "spoken answers",
    "best_of": "ranked answers",
    "echo": "answers with their prompt",
    "frequency_penalty": "penalties",
    "function_call": "tools",
    "functions": "tools",
    "logit_bias": "biased logits",
    "modalities": "answers other than text",
    "presence_penalty": "penalties",
    "reasoning_effort": "degrees of reasoning",
    "response_format": "constrained formats",
    "suffix": "insertions",
    "tool_choice": "tools",
    "tools": "tools",
    "verbosity": "degrees of verbosity",
    "web_search_options": "web searches",
}
"""Fields of OpenAI's API that would change the answer, and what weftlm does not have; their neutral values pass."""


def invalid(problems: Sequence[Any], known: Iterable[str] = ()) -> ApiError:
    """The first field at fault of a pydantic report, and all that was said of it.

    Args:
        problems: pydantic's list of problems; places may begin with where the value lay (`body`).
        known: names allowed at the top, for a suggestion.
    """
    places = [tuple(part for part in problem["loc"] if part not in ("body", "query", "path")) for problem in problems]
    field = str(places[0][0]) if places and places[0] else ""
    if not field:
        return ApiError(400, f"the body {_said(problems[0])}; it must be a JSON object", code="invalid_body")
    if field in NOT_OFFERED and not any(problem["type"] == "extra_forbidden" for problem in problems):
        return ApiError(
            400,
            f"{field} is {_short(_input(problems[0], len(places[0])))}: {NOT_OFFERED[field]} are not offered; "
            "leave it out",
            param=field,
            code="unsupported_value",
        )
    here = [(place, problem) for place, problem in zip(places, problems, strict=True) if str(place[0]) == field]
    place, problem = here[0]
    if problem["type"] == "extra_forbidden":
        dotted = ".".join(str(part) for part in place if not str(part).endswith(("]", "Model")))
        hint = did_you_mean(field, known) if len(place) == 1 and known else ""
        return ApiError(400, f"{dotted}: unknown field{hint}", param=field, code="unknown_field")
    if problem["type"] == "missing":
        dotted = ".".join(str(part) for part in place)
        return ApiError(400, f"{dotted}: missing", param=field, code="missing_field")
    said = list(dict.fromkeys(_said(problem) for _, problem in here))
    return ApiError(400, f"{field}: {'; or '.join(said)}", param=field, code="invalid_value")


def _said(problem: Mapping[str, Any]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return f"{message} (got {_short(problem.get('input'))})"


def _input(problem: Mapping[str, Any], depth: int) -> Any:
    return problem.get("input") if depth == 1 else {"...": problem.get("input")}


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def add_handlers(app: FastAPI) -> None:
    """Answer every error of an app in OpenAI's form."""

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        messages = {
            404: f"there is no {request.url.path[:200]} here; see /openapi.json",
            405: f"{request.url.path[:200]} has no {request.method[:20]}",
        }
        message = messages.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return invalid(error.errors()).response()

    async def full(request: Request, error: Exception) -> Response:
        assert isinstance(error, QueueFullError)
        return queue_full(error).response()

    async def refused(request: Request, error: Exception) -> Response:
        return ApiError(400, str(error), code="refused").response()

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_LEFT)

    async def bug(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed; its log says why").response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(StarletteHTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(QueueFullError, full)
    app.add_exception_handler(ConfigError, refused)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(ClientLeftError, left)
    app.add_exception_handler(Exception, bug)

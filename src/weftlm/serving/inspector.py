"""The inspector's page and its JSON routes: the served models, and what one of them makes of a text.

Each model has one thread that answers about it, one question at a time; the served model itself is never touched, see
`inspection.py`. The page is whole in this package and loads nothing from elsewhere; it asks again for each model it
compares and each expert it leaves out, and generates through `/v1/completions`.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field, TypeAdapter

from weftlm.errors import NumericsError, WeftError, did_you_mean
from weftlm.pipeline.any_model import OpenModel
from weftlm.reporting.page import page_file as shared_file
from weftlm.serving.answers import unless_gone
from weftlm.serving.api_errors import ApiError
from weftlm.serving.inspection import MAX_CHARACTERS, Inspection, Inspector, ModelFacts
from weftlm.serving.limits import JsonRoute
from weftlm.serving.request import QueueFullError
from weftlm.serving.schemas import Body

PAGE = Path(__file__).parent / "page"
WAITING = 16
"""Maximum queued questions about one model."""
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

Name = Annotated[str, Field(max_length=1_000)]


class InspectRequest(Body):
    """A text to inspect.

    Attributes:
        model: Name of the model.
        text: Text, of at most as many characters and tokens as `/api/models` says.
        without: Expert to leave out.
        module: Module whose weights are wanted, in place of all layers'.
    """

    model: Name
    text: Annotated[str, Field(max_length=MAX_CHARACTERS)]
    without: Name | None = None
    module: Name | None = None


class _Desk:
    """One model's inspector, and the thread in which it works."""

    def __init__(self, name: str, opened: OpenModel) -> None:
        self.inspector = Inspector(name, opened)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"inspect {name}")
        self.asked = 0

    async def inspect(self, request: Request, asked: InspectRequest) -> bytes:
        """Inspect in the model's thread, after the questions before; not begun once the client has left.

        Raises:
            QueueFullError: Too many questions wait.
            ApiError: The question is refused, or the model fails on it.
            ClientDisconnect: The client left.
        """
        if self.asked >= WAITING:
            raise QueueFullError(self.asked, 2.0)
        self.asked += 1

        def work() -> bytes:
            found = self.inspector.inspect(asked.text, without=asked.without, module=asked.module)
            return TypeAdapter(Inspection).dump_json(found)

        async def done() -> bytes:
            return await asyncio.get_running_loop().run_in_executor(self.thread, work)

        try:
            return await unless_gone(request.receive, done())
        except WeftError as error:
            raise ApiError(500 if isinstance(error, NumericsError) else 400, str(error)) from error
        finally:
            self.asked -= 1


def inspector_router(models: Mapping[str, OpenModel]) -> APIRouter:
    """The page at `/`, its files under `/page/`, its questions under `/api/`.

    Errors are raised as `ApiError`; `api_errors.add_handlers` makes responses of them. The page and its files hold
    nothing secret and must be answered without a key, so that the page can ask for one.

    Args:
        models: Models by the name they are served under. Nothing may run on them while the router is made.
    """
    desks = {name: _Desk(name, opened) for name, opened in models.items()}
    facts = {"models": tuple(desk.inspector.facts() for desk in desks.values())}
    router = APIRouter(tags=["inspector"], route_class=JsonRoute)

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return _file("index.html")

    @router.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        return _file(name)

    @router.get("/api/models")
    async def list_models() -> dict[str, tuple[ModelFacts, ...]]:
        """Every served model, with its experts, layers and modules."""
        return facts

    @router.post("/api/inspect", response_model=Inspection)
    async def inspect(request: Request, asked: InspectRequest) -> Response:
        """Inspect a text: loss and alternatives of every token, and the experts' weights."""
        if asked.model not in desks:
            message = f"there is no model {asked.model!r}{did_you_mean(asked.model, desks)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return Response(await desks[asked.model].inspect(request, asked), media_type="application/json")

    return router


@functools.cache
def _files() -> dict[str, bytes]:
    """The page's files by name."""
    files = {file.name: file.read_bytes() for file in PAGE.iterdir() if file.suffix in TYPES}
    shared = {name: shared_file(name).encode() for name in ("theme.css", "theme.js", "trace.css", "trace.js")}
    return {**files, **shared}


def _file(name: str) -> Response:
    if name not in _files():
        raise ApiError(404, f"the page has no file {name[:100]!r}", code="not_found")
    return Response(_files()[name], headers=HEADERS, media_type=TYPES[Path(name).suffix])

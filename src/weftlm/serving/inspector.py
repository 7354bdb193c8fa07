"""The inspector's page and what it asks: which models there are, and what they make of a text.

Each model has one thread that answers about it, one question at a time; the served model itself is never touched, see
`inspection.py`. The page is whole in this package and loads nothing from elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import Field, TypeAdapter

from weftlm.errors import NumericsError, WeftError, did_you_mean
from weftlm.pipeline.any_model import OpenModel
from weftlm.reporting.layout import page_file as shared_file
from weftlm.reporting.traces import colour_rules
from weftlm.serving.answers import unless_gone
from weftlm.serving.api_errors import ApiError, queue_full
from weftlm.serving.inspection import Inspector, compare
from weftlm.serving.inspection_facts import (
    Comparison,
    ExpertCost,
    FieldError,
    Inspection,
    ModelFacts,
    Totals,
)
from weftlm.serving.inspection_parts import MAX_CHARACTERS
from weftlm.serving.limits import read_json
from weftlm.serving.request import Finished, Generator, QueueFullError, Sampling
from weftlm.serving.routes import ERRORS
from weftlm.serving.schemas import WHOLE, Sent

PAGE = Path(__file__).parent / "page"
WAITING = 16
"""Questions that may wait for one model."""
MAX_NEW_TOKENS = 512
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

T = TypeVar("T")
Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
Name = Annotated[str, Field(max_length=1_000)]


class InspectRequest(Sent):
    """A text to look at.

    Attributes:
        model: name of the model.
        text: at most as many characters and tokens as `/api/models` says.
        without: an expert to leave out.
        module: the module whose weights are wanted, in place of all layers'.
    """

    model: Name
    text: Text
    without: Name | None = None
    module: Name | None = None


class CompareRequest(Sent):
    """A text to look at with two models.

    Attributes:
        a: name of the one model.
        b: of the other.
        text: as for one model.
    """

    a: Name
    b: Name
    text: Text


class LeaveOneOutRequest(Sent):
    """A text on which every expert is left out once.

    Attributes:
        model: name of the model.
        text: as for one model.
    """

    model: Name
    text: Text


class GenerateRequest(Sent):
    """A text to go on with.

    Attributes:
        model: name of the model.
        text: what came before; empty for the start of a document.
        max_tokens: at most; fewer where the model's positions end.
        temperature: 0 takes the most likely token.
        seed: of the draw.
    """

    model: Name
    text: Text
    max_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS), WHOLE] = 64
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.8
    seed: Annotated[int, Field(ge=0, lt=2**53), WHOLE] = 0


@dataclass(frozen=True)
class Models:
    """Every model that is served."""

    models: tuple[ModelFacts, ...]


@dataclass(frozen=True)
class LeaveOneOut:
    """What each expert is worth on a text.

    Attributes:
        model: name of the model.
        totals: with all experts.
        costs: of leaving each one out, the dearest first.
    """

    model: str
    totals: Totals
    costs: tuple[ExpertCost, ...]


@dataclass(frozen=True)
class Continuation:
    """What came after a text.

    Attributes:
        text: the new part alone.
    """

    text: str


def _asks(kind: type[Sent], models: Mapping[str, Any], max_characters: int) -> dict[str, Any]:
    """What the OpenAPI document says of a route that reads its body by itself."""
    statuses = [400, 404, 408, 413, 415, 429, 500, *([503] if kind is GenerateRequest else [])]
    described = kind.model_json_schema()
    for name, field in described["properties"].items():
        if name in ("model", "a", "b"):
            field["enum"] = list(models)
        if name == "text":
            field |= {"minLength": 0 if kind is GenerateRequest else 1, "maxLength": max_characters}
    schema = {"application/json": {"schema": described}}
    return {
        "responses": {status: ERRORS[status] for status in statuses},
        "openapi_extra": {"requestBody": {"required": True, "content": schema}},
    }


class _Desk:
    """One model's inspector, and the thread in which it works."""

    def __init__(self, name: str, opened: OpenModel, max_characters: int) -> None:
        self.inspector = Inspector(name, opened, max_characters=max_characters)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"inspect {name}")
        self.asked = 0

    async def ask(self, request: Request, work: Callable[[], T]) -> T:
        """Do something in the model's thread, after what was asked before; not begun once the client has left.

        Raises:
            ApiError: too many wait, or the work was refused.
            ClientLeftError: the client left.
        """
        if self.asked >= WAITING:
            raise queue_full(QueueFullError(self.asked, 2.0))
        self.asked += 1

        async def done() -> T:
            return await asyncio.get_running_loop().run_in_executor(self.thread, work)

        try:
            return await unless_gone(request.receive, done())
        except FieldError as error:
            status = 404 if error.missing else 400
            raise ApiError(status, str(error), param=error.field, code=error.code) from error
        except WeftError as error:
            raise ApiError(500 if isinstance(error, NumericsError) else 400, str(error)) from error
        finally:
            self.asked -= 1


def inspector_router(
    models: Mapping[str, OpenModel], engines: Mapping[str, Generator], *, max_characters: int = MAX_CHARACTERS
) -> APIRouter:
    """The page at `/`, its files under `/page/`, its questions under `/api/`.

    Errors are raised as `ApiError`; `api_errors.add_handlers` makes responses of them. A key, where one is needed, is
    asked for by whoever includes the router: the page and its files hold nothing secret and must be open, so that the
    page can ask for the key.

    Args:
        models: by the name they are served under. Nothing may run on them while the router is made.
        engines: what generates, by the same names; a model without one is generated from by itself.
        max_characters: of a text, 8192 at most; fewer where no text of so many fits a model's context.
    """
    desks = {name: _Desk(name, opened, max_characters) for name, opened in models.items()}
    longest = max((desk.inspector.max_characters for desk in desks.values()), default=max_characters)
    router = APIRouter(tags=["inspector"])
    files = {file.name: _file(file) for file in sorted(PAGE.iterdir()) if file.suffix in _TYPES}
    files["colours.css"] = (colour_rules().encode(), _TYPES[".css"])
    files |= {name: (shared_file(name).encode(), _TYPES[Path(name).suffix]) for name in ("theme.css", "theme.js")}

    def desk_of(name: str, field: str = "model") -> _Desk:
        if name not in desks:
            raise ApiError(
                404, f"there is no model {name!r}{did_you_mean(name, desks)}", param=field, code="model_not_found"
            )
        return desks[name]

    def page_file(name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"the page has no file {name[:100]!r}", code="not_found")
        content, kind = files[name]
        return Response(content, headers=_HEADERS, media_type=kind)

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return page_file("index.html")

    @router.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        return page_file(name)

    @router.get("/api/models", response_model=Models, responses={500: ERRORS[500]})
    async def list_models() -> Response:
        """Every model that can be looked at, with its experts, layers and modules."""
        return _json(Models, Models(tuple(desk.inspector.facts() for desk in desks.values())))

    @router.post("/api/inspect", response_model=Inspection, **_asks(InspectRequest, models, longest))
    async def inspect(request: Request) -> Response:
        """Look at a text: loss and alternatives of every token, and the experts' weights."""
        asked = await read_json(request, InspectRequest)
        desk = desk_of(asked.model)
        look = functools.partial(desk.inspector.inspect, asked.text, without=asked.without, module=asked.module)
        return _json(Inspection, await desk.ask(request, look))

    @router.post("/api/compare", response_model=Comparison, **_asks(CompareRequest, models, longest))
    async def compare_models(request: Request) -> Response:
        """Look at a text with two models, side by side."""
        asked = await read_json(request, CompareRequest)
        a, b = desk_of(asked.a, "a"), desk_of(asked.b, "b")
        return _json(Comparison, await a.ask(request, lambda: compare(a.inspector, b.inspector, asked.text)))

    @router.post("/api/leave-one-out", response_model=LeaveOneOut, **_asks(LeaveOneOutRequest, models, longest))
    async def leave_one_out(request: Request) -> Response:
        """Leave every expert out once; others may ask in between."""
        asked = await read_json(request, LeaveOneOutRequest)
        desk = desk_of(asked.model)
        inspector = desk.inspector
        if len(inspector.experts) < 2:
            count = len(inspector.experts) or "no"
            raise ApiError(404, f"{asked.model} has {count} experts; leaving one out needs two", param="model")
        totals = await desk.ask(request, lambda: inspector.totals(asked.text))
        costs = [
            await desk.ask(request, lambda name=name: inspector.cost_without(asked.text, name))  # type: ignore[misc]
            for name in inspector.experts
        ]
        costs.sort(key=lambda cost: -cost.change)
        return _json(LeaveOneOut, LeaveOneOut(asked.model, totals, tuple(costs)))

    @router.post("/api/generate", response_model=Continuation, **_asks(GenerateRequest, models, longest))
    async def generate(request: Request) -> Response:
        """Go on with a text."""
        asked = await read_json(request, GenerateRequest)
        desk = desk_of(asked.model)
        inspector, engine = desk.inspector, engines.get(asked.model)
        if engine is None:
            text = await desk.ask(
                request, lambda: inspector.continuation(asked.text, asked.max_tokens, asked.temperature, asked.seed)
            )
            return _json(Continuation, Continuation(text))
        ids = await desk.ask(request, lambda: inspector.prompt_ids(asked.text))
        if getattr(request.app.state, "stopping", False):
            raise ApiError(503, "the server stops", code="stopping")
        sampling = Sampling(
            max_tokens=min(asked.max_tokens, inspector.room(ids)), temperature=asked.temperature, seed=asked.seed
        )
        return _json(Continuation, Continuation(await _generated(request, engine, ids, sampling)))

    return router


async def _generated(request: Request, engine: Generator, ids: list[int], sampling: Sampling) -> str:
    """The whole answer of an engine, in the engine's own limit of time; given up when the client leaves."""
    loop, news = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(news.set)

    try:
        ticket = engine.submit(ids, sampling, on_event=wake)
    except QueueFullError as error:
        raise queue_full(error) from error
    parts: list[str] = []
    try:
        while not await request.is_disconnected():
            news.clear()
            with contextlib.suppress(TimeoutError):
                while True:
                    event = ticket.next(0)
                    parts.append(event.text)
                    if isinstance(event, Finished):
                        return _ended(event, "".join(parts))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), 1.0)
        return ""
    finally:
        ticket.cancel()


def _ended(event: Finished, text: str) -> str:
    """The text, unless the answer failed.

    Raises:
        ApiError: it failed, or took too long to begin.
    """
    if event.reason == "error":
        raise ApiError(500, event.message or "the engine failed; its log says why")
    if event.reason in ("timeout", "cancelled") and not text:
        raise ApiError(503, "the server is too busy to generate now; try again later", code=event.reason)
    return text


def _file(path: Path) -> tuple[bytes, str]:
    return path.read_bytes(), _TYPES[path.suffix]


@functools.cache
def _writer(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _json(kind: Any, value: Any) -> Response:
    return Response(_writer(kind).dump_json(value), media_type="application/json")

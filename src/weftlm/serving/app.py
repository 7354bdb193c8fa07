"""The web application: OpenAI's routes, limits, keys, figures and errors around the engines."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, Histogram, generate_latest
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from weftlm import __version__
from weftlm.errors import ConfigError
from weftlm.serving.answers import GRACE_SECONDS, Answers, unless_gone
from weftlm.serving.api_errors import ApiError, add_handlers
from weftlm.serving.chat_template import ClosedError, RefusedError, Templates
from weftlm.serving.forms import ChatForm, CompletionForm, Form, sse
from weftlm.serving.limits import Guard, JsonRoute
from weftlm.serving.metrics import Counting, Metrics
from weftlm.serving.prompts import Prompts
from weftlm.serving.request import Finished, Generator, Sampling, Token
from weftlm.serving.schemas import (
    SEED_BITS,
    Asked,
    Chat,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    ModelCard,
    ModelList,
)
from weftlm.serving.serve_config import ServeConfig

COMPLETION_TOKENS = 16
"""Tokens generated for a completion that does not say how many."""
LARGE_ANSWER = 4_000
"""Answers with more tokens and alternatives than this are written in a thread, in short calls."""


@dataclass(frozen=True)
class Served:
    """A served model.

    Attributes:
        name: Name clients use.
        engine: Generates the answers.
        prompts: The model's tokenizer.
        first: Histogram of the time to the first token.
        per_token: Histogram of the mean gap between tokens.
        created: Start of the server, seconds since 1970.
    """

    name: str
    engine: Generator
    prompts: Prompts
    first: Histogram
    per_token: Histogram
    created: int

    @property
    def card(self) -> ModelCard:
        """The model in `/v1/models`."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "weftlm"}


def build_app(engines: Mapping[str, Generator], config: ServeConfig, *, pages: Sequence[APIRouter] = ()) -> FastAPI:
    """The application that serves engines by their names.

    It starts and stops no engine. Set `app.state.stopping` before they are closed, so that late requests get 503.

    Args:
        engines: Engines by name, at least one.
        config: Limits and keys.
        pages: Further routes, `/` and those under `/api/`.
    Raises:
        ConfigError: There is no engine, or a name cannot be part of an address.
    """
    if not engines:
        raise ConfigError("there is no model to serve; name at least one")
    for name in engines:
        if not name or "/" in name or not name.isprintable() or len(name) > 200:
            raise ConfigError(
                f"a model's name is {name!r}; it must be printable, without '/', of at most 200 characters"
            )
    metrics = Metrics(engines)
    templates = Templates()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        templates.close()

    app = FastAPI(
        title="weftlm",
        version=__version__,
        description="Models of weftlm behind OpenAI's API. Every error has a JSON body.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    app.state.stopping = False
    app.state.templates = templates
    add_handlers(app)
    served = {
        name: Served(
            name, engine, Prompts(engine.opened), metrics.first.labels(name), metrics.per_token.labels(name),
            int(time.time()),
        )
        for name, engine in engines.items()
    }  # fmt: skip
    app.include_router(_openai_router(served, config, templates))

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the server runs."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics_() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    for page in pages:
        app.include_router(page)
    app.add_middleware(Guard, config=config, answer_seconds=config.timeout_seconds + GRACE_SECONDS + 1.0)
    app.add_middleware(Counting, metrics=metrics)
    return app


def _openai_router(served: Mapping[str, Served], config: ServeConfig, templates: Templates) -> APIRouter:
    router = APIRouter(prefix="/v1", route_class=JsonRoute)

    def find(name: str) -> Served:
        if name not in served:
            known = ", ".join(served)
            raise ApiError(
                404, f"there is no model {name!r:.200}; allowed: {known}", param="model", code="model_not_found"
            )
        return served[name]

    async def reply(
        request: Request, asked: Asked, model: Served, prompts: list[list[int]], sampling: Sampling, form: Form
    ) -> Response:
        """Queue every prompt n times and answer, whole or piece by piece."""
        if request.app.state.stopping:
            raise ApiError(503, "the server stops", code="stopping")
        each = [(prompt, _seeded(sampling, number)) for prompt in prompts for number in range(asked.choices)]
        timeout_s = config.timeout_seconds if asked.timeout is None else asked.timeout
        answers = Answers(model.engine, each, timeout_s, model.first, model.per_token)
        counted = sum(map(len, prompts))
        if asked.stream:
            return await _streamed(request, asked, answers, counted, form)
        try:
            await unless_gone(request.receive, _all(answers))
        finally:
            answers.cancel()
        body = form.response(answers.answers, _usage(counted, answers))
        large = answers.completion_tokens * (1 + (sampling.logprobs or 0)) > LARGE_ANSWER
        written = await asyncio.to_thread(_in_short_calls, body) if large else json.dumps(body, separators=(",", ":"))
        return Response(written, media_type="application/json")

    @router.get("/models")
    async def models() -> ModelList:
        """All served models."""
        return {"object": "list", "data": [model.card for model in served.values()]}

    @router.get("/models/{model}")
    async def model(model: str) -> ModelCard:
        """One served model."""
        return find(model).card

    @router.post("/completions", response_model=Completion)
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        """Continue texts or token ids."""
        model = find(asked.model)
        given = asked.prompt
        prompts: Any = given if isinstance(given, list) and isinstance(given[0], str | list) else [given]
        _check_answers(asked, len(prompts), config)
        if asked.best_of not in (None, asked.choices):
            message = f"best_of is {asked.best_of} and n {asked.choices}: ranked answers are not offered"
            raise ApiError(400, f"{message}; leave best_of out", param="best_of", code="unsupported_value")
        if isinstance(prompts[0], str):
            special = asked.add_special_tokens is not False
            prompts = await asyncio.to_thread(lambda: [model.prompts.text(text, special=special) for text in prompts])
        _check_ids(model, prompts)
        tokens = _room(model, prompts, asked.max_tokens, COMPLETION_TOKENS, "prompt", config)
        form = CompletionForm(model.name, model.prompts, asked.logprobs)
        return await reply(request, asked, model, prompts, _sampling(asked, tokens, asked.logprobs), form)

    @router.post("/chat/completions", response_model=Chat)
    async def chat(request: Request, asked: ChatRequest) -> Response:
        """Answer in a conversation.

        The tokenizer's chat template writes the prompt. For a model without one it is a line `role: text` for each
        message and the line `assistant:`.
        """
        model = find(asked.model)
        _check_answers(asked, 1, config)
        prompts = [await _chat_ids(model.prompts, [message.fields() for message in asked.messages], templates)]
        wanted = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
        tokens = _room(model, prompts, wanted, config.max_new_tokens, "messages", config)
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        form = ChatForm(model.name, model.prompts, top)
        return await reply(request, asked, model, prompts, _sampling(asked, tokens, top), form)

    return router


# ----------------------------------------------------------------------------------------------------------- requests


async def _chat_ids(prompts: Prompts, messages: list[dict[str, str]], templates: Templates) -> list[int]:
    """Ids of a conversation, made in a thread; chat templates are rendered in another process."""
    pool = templates.pool if prompts.has_template else None
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, prompts.chat, messages, templates.render)
    except RefusedError as error:
        raise ApiError(400, f"messages: the model's chat template refuses them: {error}", param="messages") from None
    except TimeoutError as error:
        raise ApiError(500, f"{error}; the model needs another one", code="chat_template_failed") from None
    except (ClosedError, RuntimeError) as error:  # RuntimeError: the pool is shut down
        raise ApiError(503, "the server stops", code="stopping") from error


def _check_answers(asked: Asked, prompts: int, config: ServeConfig) -> None:
    if prompts * asked.choices > config.max_answers:
        message = f"{prompts} prompts and n {asked.choices} make {prompts * asked.choices} answers"
        raise ApiError(400, f"{message}; at most {config.max_answers}", param="n", code="invalid_value")
    if asked.timeout is not None and asked.timeout > config.timeout_seconds:
        message = f"timeout is {asked.timeout:g}; at most {config.timeout_seconds:g} seconds are allowed"
        raise ApiError(400, message, param="timeout", code="invalid_value")


def _check_ids(model: Served, prompts: Sequence[Sequence[int]]) -> None:
    vocabulary = model.engine.opened.tokenizer.vocab_size
    largest = max(map(max, prompts))
    if largest >= vocabulary:
        message = f"prompt: the token id {largest} is not in the vocabulary; ids are below {vocabulary}"
        raise ApiError(400, message, param="prompt", code="invalid_value")


def _room(
    model: Served, prompts: Sequence[Sequence[int]], wanted: int | None, default: int, param: str, config: ServeConfig
) -> int:
    """Tokens each answer may have: what was asked for, or the default as far as the context leaves it."""
    context = model.engine.opened.max_length
    most = config.max_new_tokens if context is None else max(1, min(config.max_new_tokens, context - 1))
    if wanted is not None and wanted > most:
        message = f"max_tokens is {wanted:,}; {model.name} generates at most {most:,} tokens per answer"
        raise ApiError(400, message, param="max_tokens", code="invalid_value")
    longest = max(map(len, prompts))
    if longest > config.max_prompt_tokens:
        message = f"the prompt has {longest:,} tokens; at most {config.max_prompt_tokens:,} are allowed"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    left = most if context is None else context - longest
    if left < (wanted or 1):
        message = (
            f"{model.name} reads {context:,} tokens; the prompt has {longest:,} and {wanted or 1:,} more were asked "
            "for; shorten it, or ask for fewer"
        )
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    return min(default, most, left) if wanted is None else wanted


def _sampling(asked: Asked, tokens: int, top: int | None) -> Sampling:
    """How the tokens of a request are drawn."""
    return Sampling(
        max_tokens=tokens,
        temperature=0.0 if asked.top_p == 0 else 1.0 if asked.temperature is None else asked.temperature,
        top_p=asked.top_p or 1.0,
        seed=asked.seed,
        stop=asked.stops,
        logprobs=top,
        ignore_eos=bool(asked.ignore_eos),
    )


def _seeded(sampling: Sampling, number: int) -> Sampling:
    """The sampling of one of several answers: its seed is the request's plus its number, modulo 2^63."""
    return replace(sampling, seed=None if sampling.seed is None else (sampling.seed + number) % (1 << SEED_BITS))


# ---------------------------------------------------------------------------------------------------------- responses


class _Events(StreamingResponse):
    """Server-sent events of answers that are cancelled when the response ends, however it ends."""

    def __init__(self, events: AsyncIterator[bytes], answers: Answers) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answers.cancel()


async def _streamed(request: Request, asked: Asked, answers: Answers, prompt_tokens: int, form: Form) -> Response:
    """One event per chunk, then the counts where asked for, then `[DONE]`.

    Nothing is sent before the first event has come, so that what fails before it is an ordinary error. What fails later
    is sent as an event `{"error": ...}`, the last one.
    """
    with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    events = answers.events()

    async def begun() -> tuple[int, Token | Finished]:
        return await anext(events)

    try:
        first = await unless_gone(request.receive, begun())
    except BaseException:
        answers.cancel()
        raise

    async def lines() -> AsyncIterator[bytes]:
        try:
            async for index, event in _chain(first, events):
                for choice in form.chunks(index, event):
                    yield form.event([choice], {"usage": None} if with_usage else {})
                    await asyncio.sleep(0)  # others' turn; and a connection lost meanwhile is noticed
        except ApiError as error:
            yield sse(error.body())
            return
        if with_usage:
            yield form.event([], {"usage": _usage(prompt_tokens, answers)})
        yield b"data: [DONE]\n\n"

    return _Events(lines(), answers)


async def _chain(
    first: tuple[int, Token | Finished], rest: AsyncIterator[tuple[int, Token | Finished]]
) -> AsyncIterator[tuple[int, Token | Finished]]:
    yield first
    async for item in rest:
        yield item


async def _all(answers: Answers) -> None:
    async for _ in answers.events():
        pass


def _usage(prompt_tokens: int, answers: Answers) -> dict[str, int]:
    made = answers.completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": made, "total_tokens": prompt_tokens + made}


def _in_short_calls(value: Any) -> str:
    """JSON written by many short calls: one for all of it would keep Python's lock, and so the event loop."""
    return "".join(json.JSONEncoder(separators=(",", ":")).iterencode(value))

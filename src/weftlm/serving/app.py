"""The web application: OpenAI's routes and the inspector around the engines."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles

from weftlm import __version__
from weftlm.errors import ConfigError
from weftlm.serving.engine import Engine
from weftlm.serving.inspector import PAGE, inspector_router
from weftlm.serving.limits import ApiError, Guard, add_handlers
from weftlm.serving.metrics import Metrics
from weftlm.serving.prompts import Prompts
from weftlm.serving.replies import Answers, Form, in_short_calls, stream
from weftlm.serving.request import PromptError
from weftlm.serving.schemas import ChatRequest, Completion, CompletionRequest, ErrorBody, GenerationRequest
from weftlm.serving.serve_config import ServeConfig

COMPLETION_TOKENS = 16
"""Tokens generated for a completion that does not ask for a number."""


async def _after_response() -> AsyncIterator[ExitStack]:
    """What is to be done when a response has ended, however it ends."""
    with ExitStack() as stack:
        yield stack


AfterResponse = Annotated[ExitStack, Depends(_after_response)]


def build_app(engines: Mapping[str, Engine], config: ServeConfig) -> FastAPI:
    """The application that serves engines by their names; it starts and stops none, and none may run meanwhile.

    Raises:
        ConfigError: A name cannot be part of an address.
    """
    for name in engines:
        if not name or "/" in name or not name.isprintable() or len(name) > 200:
            message = f"a model's name is {name!r}; it must be printable, without '/', of at most 200 characters"
            raise ConfigError(message)
    metrics = Metrics(engines)
    app = FastAPI(
        title="weftlm",
        version=__version__,
        description="Models of weftlm behind OpenAI's API. Every error has a JSON body.",
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    add_handlers(app)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the server runs."""
        return {"status": "ok"}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """The inspector."""
        return FileResponse(PAGE / "index.html")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics_() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.include_router(_openai_router(engines, config, metrics))
    app.include_router(inspector_router({name: engine.opened for name, engine in engines.items()}))
    app.mount("/page", StaticFiles(directory=PAGE, packages=[("weftlm.reporting", "templates")]))
    app.add_middleware(Guard, config=config, metrics=metrics)
    return app


def _openai_router(engines: Mapping[str, Engine], config: ServeConfig, metrics: Metrics) -> APIRouter:
    router = APIRouter(prefix="/v1")
    served = {name: Prompts(engine.opened) for name, engine in engines.items()}
    created = int(time.time())

    def prompts_of(model: str) -> Prompts:
        if model not in served:
            message = f"there is no model {model!r:.200}; allowed: {', '.join(served)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return served[model]

    def card(model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": created, "owned_by": "weftlm"}

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """All served models."""
        return {"object": "list", "data": list(map(card, served))}

    @router.get("/models/{model}")
    async def model(model: str) -> dict[str, Any]:
        """One served model."""
        prompts_of(model)
        return card(model)

    @router.post("/completions", response_model=Completion)
    async def completions(request: Request, asked: CompletionRequest, after: AfterResponse) -> Response:
        """Continue texts or token ids."""
        prompts, given = prompts_of(asked.model), asked.prompt
        each: Any = given if isinstance(given, list) and isinstance(given[0], str | list) else [given]
        check(asked, len(each))
        if isinstance(each[0], str):
            special = asked.add_special_tokens is not False
            each = await asyncio.to_thread(lambda: [prompts.text(text, special=special) for text in each])
        return await reply(request, asked, each, after)

    @router.post("/chat/completions", response_model=Completion)
    async def chat(request: Request, asked: ChatRequest, after: AfterResponse) -> Response:
        """Answer in a conversation.

        The tokenizer's chat template writes the prompt. For a model without one it is a line `role: text` for each
        message and the line `assistant:`.
        """
        prompts = prompts_of(asked.model)
        check(asked, 1)
        try:
            async with prompts.lock:
                ids = await asyncio.to_thread(prompts.chat, [message.fields() for message in asked.messages])
        except RuntimeError as error:
            raise ApiError(500, f"{error}; the model needs another template", code="chat_template_failed") from None
        return await reply(request, asked, [ids], after)

    def check(asked: GenerationRequest, prompts: int) -> None:
        """Refuse what the server's limits do not allow, before any prompt is read."""
        most = min(config.max_answers, config.slots + config.max_waiting)
        limits = [
            ("n", prompts * (asked.n or 1), most, "answers, the prompts times n"),
            ("timeout", asked.timeout, config.timeout_seconds, "seconds"),
            ("max_tokens", asked.wanted, config.max_new_tokens, "tokens"),
        ]
        for name, given, limit, what in limits:
            if given is not None and given > limit:
                message = f"{name}: {given:g} {what}; at most {limit:g} are allowed"
                raise ApiError(400, message, param=name, code="invalid_value")

    def max_tokens(asked: GenerationRequest, longest: int) -> int:
        """Tokens each answer may have: what was asked for, or the default as far as the context allows it."""
        if longest > config.max_prompt_tokens:
            message = f"the prompt has {longest:,} tokens; at most {config.max_prompt_tokens:,} are allowed"
            raise PromptError(message, "context_length_exceeded")
        context = engines[asked.model].opened.max_length
        left = config.max_new_tokens if context is None else max(1, context - longest)
        default = min(left, config.max_new_tokens, config.max_new_tokens if asked.chat else COMPLETION_TOKENS)
        return asked.wanted or default

    async def reply(
        request: Request, asked: GenerationRequest, prompts: Sequence[list[int]], after: ExitStack
    ) -> Response:
        """Queue every prompt n times and answer, whole or piece by piece."""
        answers, form = Answers(request, after), Form(asked, served[asked.model])
        samplings = asked.samplings(max_tokens(asked, max(map(len, prompts))))
        for prompt, sampling in itertools.product(prompts, samplings):
            state = answers.submit(engines[asked.model], prompt, sampling, asked.timeout or config.timeout_seconds)
            after.callback(metrics.observe, asked.model, state)
            after.callback(state.cancel)

        def usage() -> dict[str, int]:
            read, made = sum(map(len, prompts)), sum(len(state.tokens) for state in answers.states)
            return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

        if asked.stream:
            counted = asked.stream_options is not None and asked.stream_options.include_usage
            lines = stream(answers, form, usage if counted else None)
            await anext(lines)
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(lines, headers=headers, media_type="text/event-stream")
        async for _ in answers:
            pass
        written = await asyncio.to_thread(in_short_calls, form.whole(answers.states, usage()))
        return Response(written, media_type="application/json")

    return router

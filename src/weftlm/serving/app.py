"""The web application: OpenAI's routes, limits, keys, figures and errors around the engines."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from weftlm import __version__
from weftlm.errors import ConfigError
from weftlm.serving.engine import Engine, RequestState
from weftlm.serving.limits import ApiError, Guard, add_handlers
from weftlm.serving.metrics import Metrics
from weftlm.serving.prompts import Prompts
from weftlm.serving.replies import EventQueue, Form, in_short_calls, sse
from weftlm.serving.request import ContextLengthError, Event, PromptError, Sampling
from weftlm.serving.schemas import SEED_BITS, ChatRequest, Completion, CompletionRequest, ErrorBody, GenerationRequest
from weftlm.serving.serve_config import ServeConfig

COMPLETION_TOKENS = 16
"""Tokens generated for a completion that does not ask for a number."""


async def _after_response() -> AsyncIterator[ExitStack]:
    """What is to be done when a response has ended, however it ends."""
    with ExitStack() as stack:
        yield stack


AfterResponse = Annotated[ExitStack, Depends(_after_response)]


def build_app(engines: Mapping[str, Engine], config: ServeConfig, *, pages: Sequence[APIRouter] = ()) -> FastAPI:
    """The application that serves engines by their names; it starts and stops none.

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

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics_() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    for router in (_openai_router(engines, config, metrics), *pages):
        app.include_router(router)
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
        _check(asked, len(each), config)
        if asked.best_of not in (None, asked.n or 1):
            message = f"best_of is {asked.best_of} and n {asked.n or 1}: ranked answers are not offered"
            raise ApiError(400, f"{message}; leave best_of out", param="best_of", code="unsupported_value")
        if isinstance(each[0], str):
            special = asked.add_special_tokens is not False
            each = await asyncio.to_thread(lambda: [prompts.text(text, special=special) for text in each])
        form = Form(asked.model, prompts, asked.logprobs, chat=False)
        return await reply(request, asked, each, asked.max_tokens, form, after)

    @router.post("/chat/completions", response_model=Completion)
    async def chat(request: Request, asked: ChatRequest, after: AfterResponse) -> Response:
        """Answer in a conversation.

        The tokenizer's chat template writes the prompt. For a model without one it is a line `role: text` for each
        message and the line `assistant:`.
        """
        prompts = prompts_of(asked.model)
        _check(asked, 1, config)
        try:
            with _naming("messages"):
                async with prompts.lock:
                    ids = await asyncio.to_thread(prompts.chat, [message.fields() for message in asked.messages])
        except (TimeoutError, RuntimeError) as error:
            raise ApiError(500, f"{error}; the model needs another template", code="chat_template_failed") from None
        wanted = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        form = Form(asked.model, prompts, (asked.top_logprobs or 0) if asked.logprobs else None, chat=True)
        return await reply(request, asked, [ids], wanted, form, after)

    def max_tokens(model: str, prompts: Sequence[Sequence[int]], wanted: int | None, default: int) -> int:
        """Tokens each answer may have: what was asked for, or the default as far as the context allows it."""
        longest, context = max(map(len, prompts)), engines[model].opened.max_length
        if wanted is not None and wanted > config.max_new_tokens:
            message = f"max_tokens is {wanted:,}; at most {config.max_new_tokens:,} tokens are generated per answer"
            raise ApiError(400, message, param="max_tokens", code="invalid_value")
        if longest > config.max_prompt_tokens:
            message = f"the prompt has {longest:,} tokens; at most {config.max_prompt_tokens:,} are allowed"
            raise ContextLengthError(message)
        left = default if context is None else max(1, context - longest)
        return min(default, left, config.max_new_tokens) if wanted is None else wanted

    async def reply(
        request: Request,
        asked: GenerationRequest,
        prompts: Sequence[list[int]],
        wanted: int | None,
        form: Form,
        after: ExitStack,
    ) -> Response:
        """Queue every prompt n times and answer, whole or piece by piece.

        Nothing of a stream is sent before its first event has come, so that what fails before it is an ordinary error.
        """
        engine, timeout_s = engines[asked.model], asked.timeout or config.timeout_seconds
        queue, answers = EventQueue(), list[RequestState]()
        with _naming("messages" if form.chat else "prompt"):
            tokens = max_tokens(asked.model, prompts, wanted, config.max_new_tokens if form.chat else COMPLETION_TOKENS)
            for prompt, sampling in itertools.product(prompts, _samplings(asked, tokens, form.top)):
                answers.append(engine.submit(prompt, sampling, queue.sender(len(answers)), timeout_s=timeout_s))
                after.callback(metrics.observe, asked.model, answers[-1])
                after.callback(answers[-1].cancel)

        def usage() -> dict[str, int]:
            read, made = sum(map(len, prompts)), sum(len(answer.tokens) for answer in answers)
            return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

        events = queue.until_finished(answers, request, stream=bool(asked.stream))
        first = await anext(events)
        if asked.stream:
            counts = usage if asked.stream_options is not None and asked.stream_options.include_usage else None
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            lines = _lines(first, events, form, counts)
            return StreamingResponse(lines, headers=headers, media_type="text/event-stream")
        async for _ in events:
            pass
        written = await asyncio.to_thread(in_short_calls, form.whole(answers, usage()))
        return Response(written, media_type="application/json")

    return router


async def _lines(
    first: tuple[int, Event],
    events: AsyncIterator[tuple[int, Event]],
    form: Form,
    usage: Callable[[], dict[str, int]] | None,
) -> AsyncIterator[bytes]:
    """One event per piece, then the token counts if asked for, then `[DONE]`; a failure is sent as the last event."""
    counts = {} if usage is None else {"usage": None}
    try:
        for choice in form.pieces(*first):
            yield sse(form.chunk([choice]) | counts)
        async for event in events:
            for choice in form.pieces(*event):
                yield sse(form.chunk([choice]) | counts)
                await asyncio.sleep(0)  # others' turn; and a connection lost meanwhile is noticed
    except ApiError as error:
        yield sse(error.body())
        return
    if usage is not None:
        yield sse(form.chunk([]) | {"usage": usage()})
    yield b"data: [DONE]\n\n"


@contextmanager
def _naming(param: str) -> Iterator[None]:
    """Name the field at fault where a prompt is refused."""
    try:
        yield
    except PromptError as error:
        raise ApiError(400, str(error), param=param, code=error.code) from None


def _check(asked: GenerationRequest, prompts: int, config: ServeConfig) -> None:
    answers = prompts * (asked.n or 1)
    if answers > config.max_answers:
        message = f"{prompts} prompts and n {asked.n or 1} make {answers} answers; at most {config.max_answers}"
        raise ApiError(400, message, param="n", code="invalid_value")
    if asked.timeout is not None and asked.timeout > config.timeout_seconds:
        message = f"timeout is {asked.timeout:g}; at most {config.timeout_seconds:g} seconds are allowed"
        raise ApiError(400, message, param="timeout", code="invalid_value")


def _samplings(asked: GenerationRequest, tokens: int, top: int | None) -> list[Sampling]:
    """How the tokens of each answer to a prompt are drawn: the seed is the request's plus its number, modulo 2^63."""
    first = Sampling(
        max_tokens=tokens,
        temperature=0.0 if asked.top_p == 0 else 1.0 if asked.temperature is None else asked.temperature,
        top_p=asked.top_p or 1.0,
        seed=asked.seed,
        stop=(asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ()),
        logprobs=top,
        ignore_eos=bool(asked.ignore_eos),
    )
    if asked.seed is None:
        return [first] * (asked.n or 1)
    seeds = ((asked.seed + number) % (1 << SEED_BITS) for number in range(asked.n or 1))
    return [first.model_copy(update={"seed": seed}) for seed in seeds]

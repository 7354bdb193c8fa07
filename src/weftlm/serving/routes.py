"""The routes under `/v1`, in the form of OpenAI's API."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from weftlm.serving.answers import Answers, unless_gone
from weftlm.serving.api_errors import ApiError, ErrorBody
from weftlm.serving.limits import SMALL_BODY_BYTES, checked, read_body
from weftlm.serving.metrics import ModelClock
from weftlm.serving.prompts import Prompts
from weftlm.serving.replies import Chat, Completion, ModelCard, ModelList, Usage
from weftlm.serving.request import Generator, Sampling
from weftlm.serving.schemas import SEED_BITS, ChatRequest, CompletionRequest, Forms, Kind, unflattened
from weftlm.serving.schemas import Request as Asked
from weftlm.serving.stream import EventStream
from weftlm.serving.workers import Workers
from weftlm.serving.writers import ChatWriter, CompletionWriter, Writer, json_of, usage_of

COMPLETION_TOKENS = 16
"""Generated for a completion that does not say how many."""

LONG_CHARACTERS = 4_000
"""Longer prompts are tokenised in a thread, so that they hold nobody up."""

LARGE_ANSWER = 4_000
"""Answers with more tokens and alternatives than this are written in a thread, for the same reason."""


def _streamed(model: str) -> dict[int | str, dict[str, Any]]:
    """How a stream is documented: events whose data are pieces, or an error; the last one is `[DONE]`."""
    parts = [{"$ref": f"#/components/schemas/{name}"} for name in (model, "ErrorBody")]
    json = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": parts}}
    data = {"anyOf": [{"const": "[DONE]"}, json]}
    event = {"type": "object", "required": ["data"], "properties": {"data": data}}
    return {200: {"content": {"text/event-stream": {"itemSchema": event}}}}


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is wrong."},
    404: {"model": ErrorBody, "description": "There is no such model."},
    408: {"model": ErrorBody, "description": "The body did not arrive, or nothing was generated, in time."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    415: {"model": ErrorBody, "description": "The body is not JSON."},
    429: {
        "model": ErrorBody,
        "description": "The queue is full.",
        "headers": {"Retry-After": {"description": "Seconds.", "required": True, "schema": {"type": "integer"}}},
    },
    500: {"model": ErrorBody, "description": "The model failed."},
    503: {"model": ErrorBody, "description": "The server stops."},
}


@dataclass(frozen=True)
class Served:
    """A model that can be asked.

    Attributes:
        name: clients use.
        generator: answers.
        prompts: its tokenizer.
        clock: where its times are reported to.
        created: seconds since 1970.
    """

    name: str
    generator: Generator
    prompts: Prompts
    clock: ModelClock
    created: int

    @property
    def card(self) -> ModelCard:
        """What `/v1/models` tells of it."""
        return ModelCard(id=self.name, created=self.created, owned_by="weftlm")


def openai_router(served: Mapping[str, Served], forms: Forms, workers: Workers) -> APIRouter:
    """The routes of a server.

    Args:
        served: name -> model.
        forms: of requests to them.
        workers: where long prompts are tokenised, large bodies checked, and chat templates run.
    """
    router = APIRouter(prefix="/v1")

    async def read(request: Request, kind: Kind) -> Any:
        """The request in a body; a large one is checked in another process."""
        raw = await read_body(request)
        if len(raw) <= SMALL_BODY_BYTES:
            return checked(raw, lambda value: forms.of(kind, value))
        value = await workers.run(lambda worker: worker.check(raw, kind, forms.bounds))
        return unflattened(forms.of(kind, value), value)

    def find(name: str) -> Served:
        if name not in served:
            known = ", ".join(served)
            raise ApiError(
                404, f"there is no model {name!r:.200}; allowed: {known}", param="model", code="model_not_found"
            )
        return served[name]

    async def reply(
        request: Request, asked: Asked, model: Served, prompts: list[list[int]], sampling: Sampling, writer: Writer
    ) -> Response:
        """Queue every prompt n times and answer, whole or piece by piece."""
        bounds = forms.bounds_of(model.name)
        choices = range(asked.n if asked.n is not None else 1)
        each = [(prompt, seeded(sampling, number)) for prompt in prompts for number in choices]
        if len(each) > bounds.max_answers:
            message = (
                f"{len(prompts)} prompts and n {len(choices)} make {len(each)} answers; at most {bounds.max_answers}"
            )
            raise ApiError(400, message, param="n", code="invalid_value")
        if request.app.state.stopping:
            raise ApiError(503, "the server stops", code="stopping")
        timeout_s = bounds.timeout_seconds if asked.timeout is None else asked.timeout
        answers = Answers(model.generator, each, timeout_s, model.clock)
        prompt_tokens = sum(map(len, prompts))
        if asked.stream:
            return EventStream(answers, writer, prompt_tokens, asked.include_usage)
        try:
            await unless_gone(request.receive, answers.collect())
        finally:
            answers.cancel()
        usage = usage_of(prompt_tokens, answers.completion_tokens)
        work = functools.partial(_written, writer, answers, usage)
        large = answers.completion_tokens * (1 + (sampling.logprobs or 0)) > LARGE_ANSWER
        return Response(await asyncio.to_thread(work) if large else work(), media_type="application/json")

    def room(model: Served, prompts: Sequence[Sequence[int]], wanted: int | None, default: int, param: str) -> int:
        """Tokens each answer may have: what was asked for, or the default as far as the context leaves it."""
        bounds = forms.bounds_of(model.name)
        longest = max(map(len, prompts))
        if longest > bounds.max_prompt_tokens:
            raise ApiError(
                400,
                f"the prompt has {longest:,} tokens; at most {bounds.max_prompt_tokens:,} are allowed",
                param=param,
                code="context_length_exceeded",
            )
        context = model.generator.opened.max_length
        if context is None:
            return default if wanted is None else wanted
        left = context - longest
        if left < (1 if wanted is None else wanted):
            raise ApiError(
                400,
                f"{model.name} reads {context:,} tokens; the prompt has {longest:,} and "
                f"{1 if wanted is None else wanted:,} more were asked for; shorten it, or ask for fewer",
                param=param,
                code="context_length_exceeded",
            )
        return min(default, left) if wanted is None else wanted

    @router.get("/models", responses={500: ERRORS[500]})
    async def models_() -> ModelList:
        """All models that can be asked."""
        return ModelList(data=[model.card for model in served.values()])

    @router.get("/models/{model}", responses={status: ERRORS[status] for status in (404, 500)})
    async def model_(model: str = Path(json_schema_extra={"enum": list(served)})) -> ModelCard:
        """One of them."""
        return find(model).card

    @router.post("/completions", response_model=Completion, responses={**ERRORS, **_streamed("Completion")})
    async def completions(request: Request) -> Response:
        """Continue texts."""
        asked: CompletionRequest = await read(request, "completion")
        model = find(asked.model)
        texts, ids = _split(asked.prompt)
        if texts is not None:
            special = asked.add_special_tokens is not False
            work = functools.partial(_encoded, model.prompts, texts, special)
            ids = work() if sum(map(len, texts)) <= LONG_CHARACTERS else await workers.run(lambda _: work())
        if asked.best_of not in (None, asked.n or 1):
            raise ApiError(
                400,
                f"best_of is {asked.best_of} and n {asked.n or 1}: ranked answers are not offered; leave best_of out",
                param="best_of",
                code="unsupported_value",
            )
        most = min(COMPLETION_TOKENS, forms.bounds_of(model.name).max_new_tokens)
        tokens = room(model, ids, asked.max_tokens, most, "prompt")
        sampling = sampling_of(asked, tokens, asked.logprobs)
        return await reply(
            request, asked, model, ids, sampling, CompletionWriter(model.name, model.prompts, asked.logprobs)
        )

    @router.post("/chat/completions", response_model=Chat, responses={**ERRORS, **_streamed("ChatChunk")})
    async def chat(request: Request) -> Response:
        """Answer in a conversation.

        The tokenizer's chat template writes the prompt. For a model without one it is a line `role: text` for each
        message and the line `assistant:`.
        """
        asked: ChatRequest = await read(request, "chat")
        model = find(asked.model)
        messages = [
            {"role": message.role, "content": message.text, **({"name": message.name} if message.name else {})}
            for message in asked.messages
        ]
        if model.prompts.has_template or sum(len(message["content"]) for message in messages) > LONG_CHARACTERS:
            ids = [await workers.run(lambda worker: model.prompts.chat(messages, worker.render))]
        else:
            ids = [model.prompts.chat(messages)]
        wanted = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        most = forms.bounds_of(model.name).max_new_tokens
        sampling = sampling_of(asked, room(model, ids, wanted, most, "messages"), top)
        return await reply(request, asked, model, ids, sampling, ChatWriter(model.name, model.prompts, top))

    return router


def sampling_of(asked: Asked, tokens: int, top: int | None) -> Sampling:
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


def seeded(sampling: Sampling, number: int) -> Sampling:
    """The sampling of one of several answers: its seed is the request's and its number, modulo 2^63."""
    if sampling.seed is None:
        return sampling
    return Sampling(**{**vars(sampling), "seed": (sampling.seed + number) % (1 << SEED_BITS)})


def _written(writer: Writer, answers: Answers, usage: Usage) -> bytes:
    return json_of(writer.whole(answers.answers, usage))


def _encoded(prompts: Prompts, texts: Sequence[str], special: bool) -> list[list[int]]:
    return [prompts.text(text, special=special) for text in texts]


def _split(prompt: str | list[str] | list[int] | list[list[int]]) -> tuple[list[str] | None, list[list[int]]]:
    """The texts of a prompt, or its ids."""
    if isinstance(prompt, str):
        return [prompt], []
    texts = [text for text in prompt if isinstance(text, str)]
    if texts:
        return texts, []
    lists = [ids for ids in prompt if isinstance(ids, list)]
    return None, lists or [[token for token in prompt if isinstance(token, int)]]


def serve_model(name: str, generator: Generator, clock: ModelClock) -> Served:
    """A model under a name."""
    return Served(name, generator, Prompts(generator.opened), clock, int(time.time()))

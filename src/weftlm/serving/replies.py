"""The answers to one HTTP request: their events awaited without a thread, and their JSON in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from starlette.requests import ClientDisconnect, Request

from weftlm.serving.engine import Engine, RequestState
from weftlm.serving.limits import ApiError
from weftlm.serving.prompts import Prompts
from weftlm.serving.request import Event, Finished, Sampling, Token
from weftlm.serving.schemas import GenerationRequest

POLL_SECONDS = 0.25
"""Between two looks at whether a client that waits is still there."""
LEAST_NATS = -9999.0
"""Written for the logarithm of zero, which JSON cannot hold."""


class Answers:
    """Answers while engines generate them; iterated, it gives each event with the number of its answer.

    The queue holds at most as many events as the answers may have tokens, however slowly a client reads.

    Attributes:
        states: Requests in the engine, which hold the answers.
    """

    def __init__(self, http: Request, after: ExitStack) -> None:
        self.states: list[RequestState] = []
        self._queue: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        after.callback(asyncio.create_task(self._watch(http)).cancel)

    async def _watch(self, http: Request) -> None:
        """Put None into the queue when the client leaves."""
        while not await http.is_disconnected():
            await asyncio.sleep(POLL_SECONDS)
        self._queue.put_nowait(None)

    def submit(self, engine: Engine, prompt: Sequence[int], sampling: Sampling, timeout_s: float) -> RequestState:
        """Queue a request whose events come here."""
        index = len(self.states)

        def send(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        self.states.append(engine.submit(prompt, sampling, send, timeout_s=timeout_s))
        return self.states[-1]

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """Events until all answers are finished.

        Raises:
            ApiError: An answer failed (500), or all ended before they began: the time was over (408), or the server
                stops (503).
            ClientDisconnect: The client left.
        """
        left = len(self.states)
        while left:
            event = await self._queue.get()
            if event is None:
                raise ClientDisconnect
            if isinstance(event[1], Finished):
                left -= 1
                if event[1].reason == "error":
                    raise ApiError(500, f"the model failed: {event[1].message}", code="generation_failed")
                if not left and not any(state.tokens for state in self.states):
                    reasons = {state.finished.reason for state in self.states if state.finished is not None}
                    if reasons == {"timeout"}:
                        message = "nothing was generated within the time limit; try again later"
                        raise ApiError(408, message, code="timeout")
                    if reasons <= {"timeout", "cancelled"}:
                        raise ApiError(503, "the server stops", code="stopping")
            yield event


class Form:
    """The JSON of one request's answers, whole and in the pieces of a stream."""

    def __init__(self, asked: GenerationRequest, prompts: Prompts) -> None:
        self.top, self.chat = asked.top, asked.chat
        self._prompts = prompts
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": name, "created": int(time.time()), "model": asked.model}
        self._begun: set[int] = set()
        self._shown: Counter[int] = Counter()  # characters given out of each answer

    def whole(self, answers: Sequence[RequestState], usage: dict[str, int]) -> dict[str, Any]:
        """The response when all answers are finished."""
        choices = []
        for index, answer in enumerate(answers):
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            content = {"message": message} if self.chat else {"text": answer.text}
            reason = answer.finished.reason if answer.finished is not None else None
            choices.append(self._choice(index, content, answer.tokens, reason))
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": usage}

    def chunk(self, choices: Sequence[dict[str, Any]], **counts: Any) -> bytes:
        """One event of a stream."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return sse({**self._head, "object": kind, "choices": choices, **counts})

    def pieces(self, index: int, event: Event) -> list[dict[str, Any]]:
        """The choices an event adds to a stream; none while it shows nothing."""
        tokens, reason = ([event], None) if isinstance(event, Token) else ([], event.reason)
        shows = bool(event.text) or bool(tokens and self.top is not None)
        if not self.chat:
            return [self._choice(index, {"text": event.text}, tokens, reason)] if shows or reason else []
        found = []
        if index not in self._begun:
            self._begun.add(index)
            found.append(self._choice(index, {"delta": {"role": "assistant", "content": ""}}))
        if shows:
            found.append(self._choice(index, {"delta": {"content": event.text}}, tokens))
        if reason is not None:
            found.append(self._choice(index, {"delta": {}}, (), reason))
        return found

    def _choice(
        self, index: int, content: dict[str, Any], tokens: Sequence[Token] = (), reason: str | None = None
    ) -> dict[str, Any]:
        logprobs: dict[str, Any] | None = None
        if self.top is not None and tokens:
            logprobs = self._chat_logprobs(tokens) if self.chat else self._completion_logprobs(index, tokens)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _completion_logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            likely: dict[str, float] = {}
            for other, nats in (*token.top, (token.id, token.logprob)):
                likely.setdefault(self._prompts.shown(other)[0], _nats(nats))
            found["tokens"].append(self._prompts.shown(token.id)[0])
            found["token_logprobs"].append(_nats(token.logprob))
            found["top_logprobs"].append(likely)
            found["text_offset"].append(self._shown[index])
            self._shown[index] += len(token.text)
        return found if self.top else {**found, "top_logprobs": None}

    def _chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        def shown(token: int, nats: float | None) -> dict[str, Any]:
            text, value = self._prompts.shown(token)
            return {"token": text, "logprob": _nats(nats), "bytes": value}

        content = [
            {**shown(token.id, token.logprob), "top_logprobs": [shown(*other) for other in token.top]}
            for token in tokens
        ]  # fmt: skip
        return {"content": content, "refusal": None}


async def stream(answers: Answers, form: Form, usage: Callable[[], dict[str, int]] | None) -> AsyncIterator[bytes]:
    """One event per piece, then the token counts if asked for, then `[DONE]`; a failure is sent as the last event.

    The first item is empty and comes with the first event, so that what fails before it is an ordinary error.
    """
    events, counts = aiter(answers), {} if usage is None else {"usage": None}
    event: tuple[int, Event] | None = await anext(events)
    yield b""
    try:
        while event is not None:
            for choice in form.pieces(*event):
                yield form.chunk([choice], **counts)
                await asyncio.sleep(0)  # others' turn; and a connection lost meanwhile is noticed
            event = await anext(events, None)
    except ClientDisconnect:
        return
    except ApiError as error:
        yield sse(error.body())
        return
    if usage is not None:
        yield form.chunk([], usage=usage())
    yield b"data: [DONE]\n\n"


def sse(value: Any) -> bytes:
    """A server-sent event whose data is JSON."""
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode("ascii")


def in_short_calls(value: Any) -> str:
    """JSON written by many short calls: one for all of it would keep Python's lock, and so the event loop."""
    return "".join(json.JSONEncoder(separators=(",", ":")).iterencode(value))


def _nats(value: float | None) -> float:
    if value is None or math.isnan(value):
        return LEAST_NATS
    return max(min(value, 0.0), LEAST_NATS)

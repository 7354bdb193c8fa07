"""The answers to one HTTP request: their events awaited without a thread, and their JSON in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect, Request

from weftlm.serving.engine import RequestState
from weftlm.serving.limits import ApiError
from weftlm.serving.prompts import Prompts
from weftlm.serving.request import Event, Finished, Token

POLL_SECONDS = 0.25
"""Between two looks at whether a client that waits is still there."""
LEAST_NATS = -9999.0
"""Written for the logarithm of zero, which JSON cannot hold."""


class EventQueue(asyncio.Queue[tuple[int, Event]]):
    """Events of the answers to one HTTP request, with the number of their answer, put by the threads of engines.

    It holds at most as many as the answers may have tokens, however slowly a client reads.
    """

    def sender(self, index: int) -> Callable[[Event], None]:
        """What an engine calls with the events of an answer."""
        loop = asyncio.get_running_loop()

        def send(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self.put_nowait, (index, event))

        return send

    async def until_finished(
        self, requests: Sequence[RequestState], http: Request, *, stream: bool
    ) -> AsyncIterator[tuple[int, Event]]:
        """Events until all answers are finished.

        Args:
            requests: Requests in the engine, which hold the answers.
            http: Request whose client waits.
            stream: Whether a response begins with the first event; it notices by itself when the client leaves.
        Raises:
            ApiError: An answer failed (500), or all ended before they began: the time was over (408), or the server
                stops (503).
            ClientDisconnect: The client left.
        """
        left, begun, clock = len(requests), False, asyncio.get_running_loop().time
        look = clock() + POLL_SECONDS
        while left:
            event: Event | None = None
            with suppress(TimeoutError):
                async with asyncio.timeout_at(look):
                    index, event = await self.get()
            if clock() >= look:  # also while events come quickly
                if not (stream and begun) and await http.is_disconnected():
                    raise ClientDisconnect
                look = clock() + POLL_SECONDS
            if event is None:
                continue
            if isinstance(event, Finished):
                left -= 1
                if event.reason == "error":
                    raise ApiError(500, f"the model failed: {event.message}", code="generation_failed")
                if not left and not any(request.tokens for request in requests):
                    _check_reasons({request.finished.reason for request in requests if request.finished is not None})
            begun = True
            yield index, event


def _check_reasons(reasons: set[str]) -> None:
    """Refuse answers that ended before they began."""
    if reasons == {"timeout"}:
        raise ApiError(408, "nothing was generated within the time limit; try again later", code="timeout")
    if reasons <= {"timeout", "cancelled"}:
        raise ApiError(503, "the server stops", code="stopping")


class Form:
    """The JSON of one request's answers, whole and in the pieces of a stream.

    Attributes:
        top: Alternatives reported for each token; None for no log-probabilities.
        chat: Whether the answers are messages of a chat.

    Args:
        model: Name of the model.
        prompts: The model's tokenizer.
    """

    def __init__(self, model: str, prompts: Prompts, top: int | None, *, chat: bool) -> None:
        self.top = top
        self.chat = chat
        self._prompts = prompts
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": name, "created": int(time.time()), "model": model}
        self._begun: set[int] = set()
        self._shown: Counter[int] = Counter()  # characters given out of each answer

    def whole(self, answers: Sequence[RequestState], usage: dict[str, int]) -> dict[str, Any]:
        """The response when all answers are finished."""
        choices = []
        for index, answer in enumerate(answers):
            assert answer.finished is not None
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            content = {"message": message} if self.chat else {"text": answer.text}
            choices.append(self._choice(index, content, answer.tokens, answer.finished.reason))
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": usage}

    def pieces(self, index: int, event: Event) -> list[dict[str, Any]]:
        """The choices an event adds to a stream; none while it shows nothing."""
        tokens, reason = ([event], None) if isinstance(event, Token) else ([], event.reason)
        shows = bool(event.text) or bool(tokens and self.top is not None)
        if not self.chat:
            return [self._choice(index, {"text": event.text}, tokens, reason)] if shows or reason else []
        deltas: list[tuple[dict[str, str], Sequence[Token], str | None]] = []
        if index not in self._begun:
            self._begun.add(index)
            deltas.append(({"role": "assistant", "content": ""}, (), None))
        if shows:
            deltas.append(({"content": event.text}, tokens, None))
        if reason is not None:
            deltas.append(({}, (), reason))
        return [self._choice(index, {"delta": delta}, tokens, ended) for delta, tokens, ended in deltas]

    def chunk(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One event of a stream."""
        return {**self._head, "object": "chat.completion.chunk" if self.chat else "text_completion", "choices": choices}

    def _choice(
        self, index: int, content: dict[str, Any], tokens: Sequence[Token], reason: str | None
    ) -> dict[str, Any]:
        logprobs: dict[str, Any] | None = None
        if self.top is not None and tokens:
            logprobs = self._chat_logprobs(tokens) if self.chat else self._completion_logprobs(index, tokens)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _completion_logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        name = self._prompts.name_of
        tops, offsets = [], []
        for token in tokens:
            likely: dict[str, float] = {}
            for other, nats in (*token.top[: self.top], (token.id, token.logprob)):
                likely.setdefault(name(other), _nats(nats))
            tops.append(likely)
            offsets.append(self._shown[index])
            self._shown[index] += len(token.text)
        return {
            "tokens": [name(token.id) for token in tokens],
            "token_logprobs": [_nats(token.logprob) for token in tokens],
            "top_logprobs": tops if self.top else None,
            "text_offset": offsets,
        }

    def _chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        def shown(token: int, nats: float | None) -> dict[str, Any]:
            value = list(self._prompts.bytes_of(token))
            return {"token": self._prompts.name_of(token), "logprob": _nats(nats), "bytes": value}

        content = [
            {**shown(token.id, token.logprob), "top_logprobs": [shown(*other) for other in token.top]}
            for token in tokens
        ]  # fmt: skip
        return {"content": content, "refusal": None}


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

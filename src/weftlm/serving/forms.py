"""An engine's events in the two forms of OpenAI's API: whole responses, and the chunks of a stream."""

from __future__ import annotations

import json
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

from weftlm.serving.answers import Answer
from weftlm.serving.prompts import Prompts
from weftlm.serving.request import Finished, Token
from weftlm.serving.schemas import Alternative, ChatLogprobs, CompletionLogprobs, TokenLogprob

LEAST_NATS = -9999.0
"""Written for the logarithm of zero, which JSON cannot hold."""


class Form(ABC):
    """The JSON of one request's answers.

    Args:
        model: Name of the model.
        prompts: The model's tokenizer.
        top: Alternatives reported for each token; None for no log-probabilities.
    """

    prefix: ClassVar[str]
    whole: ClassVar[str]
    chunk: ClassVar[str]

    def __init__(self, model: str, prompts: Prompts, top: int | None) -> None:
        self.prompts = prompts
        self.top = top
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def response(self, answers: Sequence[Answer], usage: dict[str, int]) -> dict[str, Any]:
        """The response when all answers are finished."""
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return {**self._head, "object": self.whole, "choices": choices, "usage": usage}

    def event(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> bytes:
        """One server-sent event; `usage` is empty where no counts were asked for."""
        return sse({**self._head, "object": self.chunk, "choices": choices, **usage})

    @abstractmethod
    def chunks(self, index: int, event: Token | Finished) -> list[dict[str, Any]]:
        """The choices an event adds to a stream; none while it shows nothing."""

    @abstractmethod
    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""


class CompletionForm(Form):
    """Answers in the form of `/v1/completions`; arguments as for `Form`."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, prompts: Prompts, top: int | None) -> None:
        super().__init__(model, prompts, top)
        self._offsets: dict[int, _Offset] = defaultdict(lambda: _Offset(prompts))

    def chunks(self, index: int, event: Token | Finished) -> list[dict[str, Any]]:
        if isinstance(event, Finished):
            return [_completion(index, event.text, None, event.reason)]
        return [_completion(index, event.text, self._logprobs(index, [event]), None)] if self._shows(event) else []

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        assert answer.finished is not None
        return _completion(index, answer.text, self._logprobs(index, answer.tokens), answer.finished.reason)

    def _shows(self, token: Token) -> bool:
        return bool(token.text) or self.top is not None

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> CompletionLogprobs | None:
        if self.top is None:
            return None
        name = self.prompts.name_of
        tops: list[dict[str, float]] = []
        for token in tokens:
            likely: dict[str, float] = {}
            for other, nats in (*token.top[: self.top], (token.id, token.logprob)):
                likely.setdefault(name(other), _nats(nats))
            tops.append(likely)
        return {
            "tokens": [name(token.id) for token in tokens],
            "token_logprobs": [_nats(token.logprob) for token in tokens],
            "top_logprobs": tops if self.top else None,
            "text_offset": [self._offsets[index].of(token) for token in tokens],
        }


class ChatForm(Form):
    """Answers in the form of `/v1/chat/completions`; arguments as for `Form`."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, prompts: Prompts, top: int | None) -> None:
        super().__init__(model, prompts, top)
        self._begun: set[int] = set()

    def chunks(self, index: int, event: Token | Finished) -> list[dict[str, Any]]:
        made = []
        if index not in self._begun:
            self._begun.add(index)
            made.append(_delta(index, {"role": "assistant", "content": ""}))
        if isinstance(event, Finished):
            made += [_delta(index, {"content": event.text})] if event.text else []
            made.append(_delta(index, {}, reason=event.reason))
        elif event.text or self.top is not None:
            made.append(_delta(index, {"content": event.text}, self._logprobs([event])))
        return made

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        assert answer.finished is not None
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        reason = answer.finished.reason
        logprobs = self._logprobs(answer.tokens)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs | None:
        if self.top is None:
            return None
        content: list[TokenLogprob] = [
            {**self._alternative(token.id, token.logprob), "top_logprobs": [self._alternative(*o) for o in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _alternative(self, token: int, nats: float | None) -> Alternative:
        value = list(self.prompts.bytes_of(token))
        return {"token": self.prompts.name_of(token), "logprob": _nats(nats), "bytes": value}


class _Offset:
    """Where an answer's tokens begin in its text, though some of it is held back."""

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts
        self.shown = 0
        self.held = b""

    def of(self, token: Token) -> int:
        """The place of the next token, in characters."""
        place = self.shown + len(self.held.decode("utf-8", "ignore"))
        self.held += self.prompts.bytes_of(token.id)
        if token.text:
            self.shown += len(token.text)
            text = token.text.encode("utf-8")
            self.held = self.held[len(text) :] if self.held.startswith(text) else b""
        return place


def _completion(index: int, text: str, logprobs: CompletionLogprobs | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _delta(
    index: int, delta: dict[str, str], logprobs: ChatLogprobs | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def sse(value: Any) -> bytes:
    """A server-sent event whose data is JSON."""
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode("ascii")


def _nats(value: float | None) -> float:
    if value is None or math.isnan(value):
        return LEAST_NATS
    return max(min(value, 0.0), LEAST_NATS)

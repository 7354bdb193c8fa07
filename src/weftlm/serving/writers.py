"""An engine's events in the two forms of OpenAI's API: whole answers, and pieces of a stream."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from pydantic import BaseModel
from pydantic_core import to_json

from weftlm.serving.answers import Answer
from weftlm.serving.prompts import Prompts
from weftlm.serving.replies import (
    Alternative,
    Chat,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    TokenLogprob,
    Usage,
)
from weftlm.serving.request import Finished, FinishReason, Token

LEAST_NATS = -9999.0
"""Written for the logarithm of zero, which JSON cannot hold."""

AT_ONCE = 64
"""Entries of a long list that are written in one call, which keeps Python's lock."""


class Writer(Protocol):
    """One request's answers in one form of the API."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        """The response when all is finished."""

    def pieces(self, index: int, event: Token | Finished) -> list[BaseModel]:
        """The chunks an event makes; none while it shows nothing."""

    def counts(self, usage: Usage) -> BaseModel:
        """The last chunk, which holds the token counts alone."""


class _Begun:
    """What both forms say of a response.

    Args:
        kind: of its identifier.
        model: its name.
        prompts: tells tokens' texts.
        top: alternatives to report for each token; None for no log-probabilities.
    """

    def __init__(self, kind: str, model: str, prompts: Prompts, top: int | None) -> None:
        self.id = f"{kind}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.prompts = prompts
        self.top = top


class CompletionWriter(_Begun):
    """Answers in the form of `/v1/completions`; arguments as of `_Begun`."""

    def __init__(self, model: str, prompts: Prompts, top: int | None) -> None:
        super().__init__("cmpl", model, prompts, top)
        self._offsets: dict[int, _Offset] = {}

    def whole(self, answers: Sequence[Answer], usage: Usage) -> Completion:
        choices = []
        for index, answer in enumerate(answers):
            assert answer.finished is not None
            logprobs = self._logprobs(index, answer.tokens)
            choices.append(self._choice(index, answer.text, logprobs, answer.finished.reason))
        return self._completion(choices, usage)

    def pieces(self, index: int, event: Token | Finished) -> list[BaseModel]:
        if isinstance(event, Finished):
            return [self._completion([self._choice(index, event.text, None, event.reason)])]
        if not event.text and self.top is None:
            return []
        return [self._completion([self._choice(index, event.text, self._logprobs(index, [event]), None)])]

    def counts(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def _choice(
        self, index: int, text: str, logprobs: CompletionLogprobs | None, reason: FinishReason | None
    ) -> CompletionChoice:
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> CompletionLogprobs | None:
        if self.top is None:
            return None
        offset = self._offsets.setdefault(index, _Offset(self.prompts))
        name = self.prompts.name_of
        tops: list[dict[str, float]] = []
        for token in tokens:
            likely: dict[str, float] = {}
            for other, nats in (*token.top[: self.top], (token.id, token.logprob)):
                likely.setdefault(name(other), _nats(nats))
            tops.append(likely)
        return CompletionLogprobs(
            tokens=[name(token.id) for token in tokens],
            token_logprobs=[_nats(token.logprob) for token in tokens],
            top_logprobs=tops if self.top else None,
            text_offset=[offset.of(token) for token in tokens],
        )


class ChatWriter(_Begun):
    """Answers in the form of `/v1/chat/completions`; arguments as of `_Begun`."""

    def __init__(self, model: str, prompts: Prompts, top: int | None) -> None:
        super().__init__("chatcmpl", model, prompts, top)
        self._begun: set[int] = set()

    def whole(self, answers: Sequence[Answer], usage: Usage) -> Chat:
        choices = []
        for index, answer in enumerate(answers):
            assert answer.finished is not None
            message = ChatMessage(content=answer.text)
            logprobs = self._logprobs(answer.tokens)
            choices.append(
                ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=answer.finished.reason)
            )
        return Chat(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def pieces(self, index: int, event: Token | Finished) -> list[BaseModel]:
        made: list[BaseModel] = []
        if index not in self._begun:
            self._begun.add(index)
            made.append(self._piece(index, ChatDelta(role="assistant", content="")))
        if isinstance(event, Finished):
            if event.text:
                made.append(self._piece(index, ChatDelta(content=event.text)))
            made.append(self._piece(index, ChatDelta(), reason=event.reason))
        elif event.text or self.top is not None:
            made.append(self._piece(index, ChatDelta(content=event.text), self._logprobs([event])))
        return made

    def counts(self, usage: Usage) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=[], usage=usage)

    def _piece(
        self, index: int, delta: ChatDelta, logprobs: ChatLogprobs | None = None, reason: FinishReason | None = None
    ) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=[choice])

    def _logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs | None:
        if self.top is None:
            return None
        return ChatLogprobs(content=[self._token(token) for token in tokens])

    def _token(self, token: Token) -> TokenLogprob:
        alternatives = [self._alternative(other, nats) for other, nats in token.top[: self.top]]
        shown = self._alternative(token.id, token.logprob)
        return TokenLogprob(token=shown.token, logprob=shown.logprob, bytes=shown.bytes, top_logprobs=alternatives)

    def _alternative(self, token: int, nats: float | None) -> Alternative:
        return Alternative(
            token=self.prompts.name_of(token), logprob=_nats(nats), bytes=list(self.prompts.bytes_of(token))
        )


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


def json_of(value: Any) -> bytes:
    """A reply as JSON, bit for bit that of `model_dump_json`, in many short calls.

    One call for all of it would keep Python's lock, and so the event loop, for 25 ms per MB.
    """
    if isinstance(value, BaseModel):
        fields = (to_json(name) + b":" + json_of(getattr(value, name)) for name in type(value).model_fields)
        return b"{" + b",".join(fields) + b"}"
    if isinstance(value, list) and len(value) > AT_ONCE:
        parts = (to_json(value[start : start + AT_ONCE])[1:-1] for start in range(0, len(value), AT_ONCE))
        return b"[" + b",".join(parts) + b"]"
    if isinstance(value, list):
        return b"[" + b",".join(map(json_of, value)) + b"]"
    return to_json(value)


def usage_of(prompt_tokens: int, completion_tokens: int) -> Usage:
    """Token counts with their sum."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


def _nats(value: float | None) -> float:
    if value is None or math.isnan(value):
        return LEAST_NATS
    return max(min(value, 0.0), LEAST_NATS)

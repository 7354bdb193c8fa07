"""Answers as server-sent events, for as long as the client is there and reads."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from weftlm.serving.answers import Answers, failure, unless_gone
from weftlm.serving.api_errors import ClientLeftError
from weftlm.serving.request import Finished, Token
from weftlm.serving.writers import Writer, usage_of

log = logging.getLogger(__name__)

ABORT = "weftlm.abort"
"""Key of the ASGI scope under which weftlm's own server puts a function that drops the connection."""


class EventStream(Response):
    """One event per piece, then the counts where asked for, then `[DONE]`.

    Nothing is sent before the first event has come, so that what fails before it is an ordinary error. What fails later
    is sent as an event `{"error": ...}`, the last one. A client that has not read its answer by the end of the
    request's time loses the connection; the engine has ended the answer by then whether or not it was read.
    """

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, writer: Writer, prompt_tokens: int, include_usage: bool) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.answers = answers
        self.writer = writer
        self.prompt_tokens = prompt_tokens
        self.include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(scope, send))
        except ClientLeftError:
            pass
        finally:
            self.answers.cancel()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        events = self.answers.events()
        first = await anext(events)
        self.answers.check()
        try:
            async with asyncio.timeout_at(self.answers.deadline):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async for piece in self._pieces(first, events):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                    await asyncio.sleep(0)  # others' turn; and a connection lost meanwhile is noticed
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log.info("a client did not read its answer in time; its connection is closed")
            if (abort := scope.get(ABORT)) is not None:
                abort()
                await asyncio.sleep(0)  # let the server learn of it

    async def _pieces(
        self, first: tuple[int, Token | Finished], events: AsyncIterator[tuple[int, Token | Finished]]
    ) -> AsyncIterator[bytes]:
        async for index, event in _chain(first, events):
            if isinstance(event, Finished) and event.reason == "error":
                yield _event(json.dumps({"error": failure(event).detail_dict()}))
                return
            for piece in self.writer.pieces(index, event):
                yield _event(self._json(piece))
        if self.include_usage:
            usage = usage_of(self.prompt_tokens, self.answers.completion_tokens)
            yield _event(self.writer.counts(usage).model_dump_json())
        yield _event("[DONE]")

    def _json(self, piece: BaseModel) -> str:
        """A piece; an empty delta stays empty, and `usage` is null only where it will come."""
        value = piece.model_dump(mode="json", exclude=None if self.include_usage else {"usage"})
        for choice in value["choices"]:
            if "delta" in choice:
                choice["delta"] = {key: text for key, text in choice["delta"].items() if text is not None}
        return json.dumps(value, separators=(",", ":"))


async def _chain(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for item in rest:
        yield item


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()

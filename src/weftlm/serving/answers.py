"""The answers to one HTTP request: queued together, waited for without a thread, cancelled together.

An engine reports each event by a callback from its own thread; the callback wakes the request's task in the event loop,
and the task takes what is there without blocking. So a waiting client costs a task and no thread. Events wait in the
tickets, at most as many as the answer may have tokens, however slowly a client reads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prometheus_client import Histogram
from starlette.requests import ClientDisconnect

from weftlm.serving.api_errors import ApiError
from weftlm.serving.request import Finished, Generator, Sampling, Ticket, Token

GRACE_SECONDS = 2.0
"""Time after the limit of a request, which the engine keeps, at which a hanging engine is given up."""

T = TypeVar("T")


@dataclass
class Answer:
    """One answer as it grows.

    Attributes:
        ticket: The engine's side.
        tokens: Tokens so far.
        finished: How it ended; None while it goes on.
        times: When the first and the last token came.
    """

    ticket: Ticket
    tokens: list[Token] = field(default_factory=list)
    finished: Finished | None = None
    times: tuple[float, float] = (0.0, 0.0)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(token.text for token in self.tokens) + (self.finished.text if self.finished is not None else "")

    def poll(self) -> Token | Finished | None:
        """The next event, if there is one."""
        try:
            event = self.ticket.next(0)
        except TimeoutError:
            return None
        if isinstance(event, Finished):
            self.finished = event
        else:
            now = time.perf_counter()
            self.times = (self.times[0] or now, now)
            self.tokens.append(event)
        return event


class Answers:
    """All answers of one HTTP request; everything is queued, or nothing.

    Args:
        generator: The model's engine.
        asked: Prompt ids and sampling of each answer.
        timeout_s: Time limit of all answers in seconds.
        first: Histogram of the time to the first token.
        per_token: Histogram of the mean gap between tokens.
    Raises:
        QueueFullError: The queue has no room for all of them.
        ConfigError: The engine refuses one.
    """

    def __init__(
        self,
        generator: Generator,
        asked: Sequence[tuple[list[int], Sampling]],
        timeout_s: float,
        first: Histogram,
        per_token: Histogram,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.answers: list[Answer] = []
        self._deadline = loop.time() + timeout_s + GRACE_SECONDS
        self._changed = asyncio.Event()
        self._first, self._per_token = first, per_token
        self._start = time.perf_counter()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._changed.set)

        try:
            for prompt_ids, sampling in asked:
                self.answers.append(Answer(generator.submit(prompt_ids, sampling, timeout_s=timeout_s, on_event=wake)))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Give up what is not finished."""
        for answer in self.answers:
            if answer.finished is None:
                answer.ticket.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Token | Finished]]:
        """Events with the number of their answer, until all are finished.

        Raises:
            ApiError: One failed (500), or all ended before they began: the time was over (408), the server stops (503).
        """
        while any(answer.finished is None for answer in self.answers):
            self._changed.clear()
            idle = True
            for index, answer in enumerate(self.answers):
                while answer.finished is None and (event := answer.poll()) is not None:
                    idle = False
                    self._observe(answer, event)
                    self._check()
                    yield index, event
            if idle and not await self._wait():
                for index, answer in enumerate(self.answers):
                    if answer.finished is None:
                        answer.ticket.cancel()
                        answer.finished = Finished("timeout")
                        self._check()
                        yield index, answer.finished

    @property
    def completion_tokens(self) -> int:
        """Generated so far, over all answers."""
        return sum(len(answer.tokens) for answer in self.answers)

    async def _wait(self) -> bool:
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _observe(self, answer: Answer, event: Token | Finished) -> None:
        first, last = answer.times
        if isinstance(event, Token) and len(answer.tokens) == 1:
            self._first.observe(first - self._start)
        elif isinstance(event, Finished) and len(answer.tokens) > 1:
            self._per_token.observe((last - first) / (len(answer.tokens) - 1))

    def _check(self) -> None:
        ends = [answer.finished for answer in self.answers if answer.finished is not None]
        for end in ends:
            if end.reason == "error":
                message = f"the model failed: {end.message or 'no reason given'}"
                raise ApiError(500, message, code="generation_failed")
        if len(ends) < len(self.answers) or any(answer.tokens for answer in self.answers):
            return
        if all(end.reason == "timeout" for end in ends):
            raise ApiError(408, "nothing was generated within the time limit; try again later", code="timeout")
        if all(end.reason in ("timeout", "cancelled") for end in ends):
            raise ApiError(503, "the server stops", code="stopping")


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, T]) -> T:
    """Do some work for as long as the client is there.

    Args:
        receive: The ASGI channel, the body read.
        work: Cancelled when the client leaves.
    Raises:
        ClientDisconnect: The client left.
    """

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(left())
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientDisconnect
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)

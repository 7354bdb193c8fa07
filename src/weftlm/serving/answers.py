"""The answers to one HTTP request: queued together, waited for without a thread, given up together.

An engine tells of each event by a callback from its own thread; the callback wakes the request's task in the event
loop, and the task takes what is there without blocking. So a waiting client costs a task and no thread. Events wait in
the tickets, at most as many as the answer may have tokens, however slowly a client reads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from weftlm.serving.api_errors import ApiError, ClientLeftError, queue_full
from weftlm.serving.request import Finished, Generator, QueueFullError, Sampling, Ticket, Token

GRACE_SECONDS = 2.0
"""An engine ends a request at its limit of time; it is given up here so much later, should the engine hang."""

T = TypeVar("T")


class Clock(Protocol):
    """Where times are reported to."""

    def first_token(self, seconds: float) -> None:
        """From the request to the first token of an answer."""

    def per_token(self, seconds: float) -> None:
        """Mean over the gaps between an answer's tokens."""


@dataclass
class Answer:
    """One answer as it grows.

    Attributes:
        tokens: so far.
        finished: how it ended; None while it goes on.
    """

    tokens: list[Token] = field(default_factory=list)
    finished: Finished | None = None

    @property
    def text(self) -> str:
        """What there is of it."""
        return "".join(token.text for token in self.tokens) + (self.finished.text if self.finished is not None else "")


class _Wake:
    """The callback of one ticket: wakes the request's task, and remembers when things came."""

    def __init__(self, loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> None:
        self.loop = loop
        self.changed = changed
        self.first: float | None = None
        self.last = 0.0

    def __call__(self) -> None:
        self.last = time.perf_counter()
        if self.first is None:
            self.first = self.last
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.changed.set)


class Answers:
    """All answers of one HTTP request.

    Attributes:
        answers: in the order of what was asked.
        deadline: on the event loop's clock; nothing is waited for after it.
    """

    def __init__(
        self, generator: Generator, asked: Sequence[tuple[list[int], Sampling]], timeout_s: float, clock: Clock
    ):
        """Queue everything, or nothing.

        Args:
            generator: the model's.
            asked: prompt ids and sampling of each answer.
            timeout_s: for all of it.
            clock: where times are reported to.
        Raises:
            ApiError: the queue has no room for all of them.
            ConfigError: the engine refuses one.
        """
        loop = asyncio.get_running_loop()
        self.deadline = loop.time() + timeout_s + GRACE_SECONDS
        self.answers = [Answer() for _ in asked]
        self._changed = asyncio.Event()
        self._clock = clock
        self._start = time.perf_counter()
        self._tickets: list[Ticket] = []
        self._wakes: list[_Wake] = []
        try:
            for prompt_ids, sampling in asked:
                wake = _Wake(loop, self._changed)
                ticket = generator.submit(prompt_ids, sampling, timeout_s=timeout_s, on_event=wake)
                self._tickets.append(ticket)
                self._wakes.append(wake)
        except QueueFullError as error:
            self.cancel()
            raise queue_full(error) from None
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Give up what is not finished."""
        for ticket, answer in zip(self._tickets, self.answers, strict=False):
            if answer.finished is None:
                ticket.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Token | Finished]]:
        """What comes, with the number of its answer, until all are finished."""
        while any(answer.finished is None for answer in self.answers):
            self._changed.clear()
            nothing = True
            for index, (ticket, answer) in enumerate(zip(self._tickets, self.answers, strict=True)):
                while answer.finished is None and (event := _poll(ticket)) is not None:
                    nothing = False
                    self._note(index, event)
                    yield index, event
            if nothing and not await self._wait():
                for index, (ticket, answer) in enumerate(zip(self._tickets, self.answers, strict=True)):
                    if answer.finished is None:
                        ticket.cancel()
                        answer.finished = Finished("timeout")
                        yield index, answer.finished

    async def collect(self) -> None:
        """Wait until all are finished.

        Raises:
            ApiError: one failed, or all ended before they began.
        """
        async for _, _ in self.events():
            self.check()
        self.check()

    def check(self) -> None:
        """See whether there is, or may be, something to answer with.

        Raises:
            ApiError: 500 when one failed, 408 when the time ended before any began, 503 when the server stopped before.
        """
        ends = [answer.finished for answer in self.answers if answer.finished is not None]
        for end in ends:
            if end.reason == "error":
                raise failure(end)
        if len(ends) < len(self.answers) or any(answer.tokens for answer in self.answers):
            return
        if all(end.reason == "timeout" for end in ends):
            raise ApiError(
                408, "nothing was generated in the time the request may take; try again later", code="timeout"
            )
        if all(end.reason in ("timeout", "cancelled") for end in ends):
            raise ApiError(503, "the server stops", code="stopping")

    @property
    def completion_tokens(self) -> int:
        """Generated so far, over all answers."""
        return sum(len(answer.tokens) for answer in self.answers)

    async def _wait(self) -> bool:
        try:
            async with asyncio.timeout_at(self.deadline):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _note(self, index: int, event: Token | Finished) -> None:
        answer, wake = self.answers[index], self._wakes[index]
        if isinstance(event, Token):
            answer.tokens.append(event)
            if len(answer.tokens) == 1:
                self._clock.first_token((wake.first or time.perf_counter()) - self._start)
            return
        answer.finished = event
        if len(answer.tokens) > 1 and wake.first is not None:
            self._clock.per_token((wake.last - wake.first) / (len(answer.tokens) - 1))


def failure(end: Finished) -> ApiError:
    """An answer that failed in the engine."""
    return ApiError(500, f"the model failed: {end.message or 'no reason given'}", code="generation_failed")


def _poll(ticket: Ticket) -> Token | Finished | None:
    try:
        return ticket.next(0)
    except TimeoutError:
        return None


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, T]) -> T:
    """Do some work for as long as the client is there.

    Args:
        receive: the ASGI channel, the body read.
        work: cancelled when the client leaves.
    Raises:
        ClientLeftError: it left.
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
        raise ClientLeftError
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)

"""A generator without a model: it says what a test scripts, at once or when told to."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence

from weftlm.pipeline.any_model import OpenModel
from weftlm.serving.request import Finished, Load, QueueFullError, Sampling, Token

Script = Callable[[list[int], Sampling], Sequence[Token | Finished]]


class FakeTicket:
    """A request; `say` is the engine's side."""

    def __init__(self, prompt_ids: list[int], sampling: Sampling, on_event: Callable[[], None] | None) -> None:
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.timeout_s: float | None = None
        self.cancelled = threading.Event()
        self.finished = False
        self._on_event = on_event
        self._events: queue.SimpleQueue[Token | Finished] = queue.SimpleQueue()

    def say(self, event: Token | Finished) -> None:
        if self.finished:
            return
        self.finished = isinstance(event, Finished)
        self._events.put(event)
        if self._on_event is not None:
            self._on_event()

    def next(self, timeout_s: float | None = None) -> Token | Finished:
        try:
            return self._events.get_nowait() if timeout_s == 0 else self._events.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None

    def cancel(self) -> None:
        self.say(Finished("cancelled"))
        self.cancelled.set()


class FakeEngine:
    """Answers with a script; without one it waits until the test speaks through its tickets.

    Attributes:
        tickets: of all requests, in order.
        places: requests that are let in; None for any number.
    """

    def __init__(self, opened: OpenModel, script: Script | None = None, places: int | None = None) -> None:
        self.opened = opened
        self.script = script
        self.places = places
        self.tickets: list[FakeTicket] = []
        self.asked = threading.Semaphore(0)

    def submit(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        *,
        timeout_s: float | None = None,
        on_event: Callable[[], None] | None = None,
    ) -> FakeTicket:
        if self.places is not None and len(self.running) >= self.places:
            raise QueueFullError(len(self.running), 2.4)
        ticket = FakeTicket(prompt_ids, sampling, on_event)
        ticket.timeout_s = timeout_s
        self.tickets.append(ticket)
        for event in self.script(prompt_ids, sampling) if self.script is not None else ():
            ticket.say(event)
        self.asked.release()
        return ticket

    def wait_for_request(self) -> FakeTicket:
        """The newest request, once there is one more."""
        assert self.asked.acquire(timeout=10), "no request came"
        return self.tickets[-1]

    @property
    def running(self) -> list[FakeTicket]:
        return [ticket for ticket in self.tickets if not ticket.finished]

    def load(self) -> Load:
        return Load(len(self.running), 0, 7, 5, dict(Counter(stop=len(self.tickets) - len(self.running))))

    def close(self) -> None:
        for ticket in self.tickets:
            ticket.say(Finished("cancelled"))


def words(opened: OpenModel) -> Script:
    """A script: the prompt again and again, token by token, up to `max_tokens`; honours nothing but `logprobs`."""

    def script(prompt_ids: list[int], sampling: Sampling) -> list[Token | Finished]:
        said: list[Token | Finished] = []
        for place in range(sampling.max_tokens):
            token = prompt_ids[place % len(prompt_ids)]
            text = opened.tokenizer.decode([token])
            if sampling.logprobs is None:
                said.append(Token(token, text))
            else:
                top = tuple((other, -0.5 - other) for other in range(sampling.logprobs))
                said.append(Token(token, text, -0.25, top))
        return [*said, Finished("length")]

    return script

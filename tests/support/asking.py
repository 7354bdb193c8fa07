"""Asking an engine, and what comes back."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from support.served import VOCAB

from weftlm.serving.engine import Engine
from weftlm.serving.request import Event, Finished, Sampling, Token

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Answer:
    """All that came of a request."""

    tokens: tuple[Token, ...]
    end: Finished

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + self.end.text


class Ticket:
    """A request and its events, taken one by one."""

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        timeout_s: float | None = None,
        on_event: Callable[[], None] = lambda: None,
    ) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.on_event = on_event
        self.request = engine.submit(prompt, sampling, self._take, timeout_s=timeout_s)
        self.cancel = self.request.cancel

    def _take(self, event: Event) -> None:
        self.events.put(event)
        self.on_event()

    def next(self) -> Event:
        return self.events.get(timeout=PATIENCE_S)

    def begun(self) -> Ticket:
        """The same, once it has a token."""
        assert isinstance(self.next(), Token)
        return self


def collect(ticket: Ticket) -> Answer:
    """Everything up to the end."""
    tokens: list[Token] = []
    while isinstance(event := ticket.next(), Token):
        tokens.append(event)
    return Answer(tuple(tokens), event)


def ask(engine: Engine, prompt: Sequence[int], sampling: Sampling) -> Answer:
    """One request alone."""
    return collect(Ticket(engine, prompt, sampling))


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """The engine's worker begins no turn meanwhile, nor is it within one."""
    begun, go, turn = threading.Event(), threading.Event(), engine._turn

    def wait() -> None:
        begun.set()
        go.wait(PATIENCE_S)
        turn()

    engine._turn = wait  # type: ignore[method-assign]
    while not begun.wait(0.005) and engine.running + engine.waiting:
        pass
    try:
        yield
    finally:
        engine._turn = turn  # type: ignore[method-assign]
        go.set()


def requests(
    count: int, seed: int, *, vocab: int = VOCAB, longest: int = 60, most: int = 24
) -> list[tuple[list[int], Sampling]]:
    """Requests of all sorts: lengths, greedy and drawn, with log-probabilities and without."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        prompt = [rng.randrange(vocab) for _ in range(rng.randint(1, longest))]
        sampling = Sampling(
            max_tokens=rng.randint(1, most),
            temperature=rng.choice([0.0, 0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 0.8]),
            seed=number,
            logprobs=rng.choice([None, 0, 5, 20]),
            ignore_eos=True,
        )
        made.append((prompt, sampling))
    return made

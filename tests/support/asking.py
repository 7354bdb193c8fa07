"""Asking an engine, and what comes back."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from support.served import VOCAB

from weftlm.serving.engine import Engine
from weftlm.serving.request import Finished, Sampling, Ticket, Token

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


def collect(ticket: Ticket) -> Answer:
    """Everything up to the end."""
    tokens: list[Token] = []
    while isinstance(event := ticket.next(PATIENCE_S), Token):
        tokens.append(event)
    return Answer(tuple(tokens), event)


def ask(engine: Engine, prompt: Sequence[int], sampling: Sampling) -> Answer:
    """One request alone."""
    return collect(engine.submit(list(prompt), sampling))


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """The engine's worker does nothing meanwhile."""
    begun, go = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        go.wait(PATIENCE_S)

    thread = threading.Thread(target=engine.call, args=(wait,))
    thread.start()
    assert begun.wait(PATIENCE_S)
    try:
        yield
    finally:
        go.set()
        thread.join(PATIENCE_S)


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

"""What is asked of a model, and what it answers, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:  # the processes of `workers.py` need no model
    from weftlm.pipeline.any_model import OpenModel

FinishReason = Literal["stop", "length", "timeout", "cancelled", "error"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        max_tokens: to generate at most; 1 and up.
        temperature: 0 takes the most likely token, the lowest id among equals.
        top_p: smallest set of most likely tokens with at least this probability, 0 < top_p <= 1.
        seed: of the draw; None draws one. The same seed, prompt and model give the same tokens whatever else runs.
        stop: texts that end the answer and are not part of it.
        logprobs: how many most likely tokens to report for each generated one; None for no log-probabilities at all.
        ignore_eos: go on after the end-of-text token, up to max_tokens.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        id: in the vocabulary.
        text: what it adds to the answer; may be empty while a character or a stop text is incomplete.
        logprob: nats, of the model's own distribution, before temperature and top_p; None where not asked for.
        top: (token id, nats) of the most likely tokens, most likely first; empty where not asked for.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Attributes:
        reason: `stop` (a stop text or end of text), `length`, `timeout`, `cancelled`, or `error`.
        text: held back until now, because it might have become a stop text.
        message: what went wrong; empty unless the reason is `error`.
    """

    reason: FinishReason
    text: str = ""
    message: str = ""


class Ticket(Protocol):
    """One running request."""

    def next(self, timeout_s: float | None = None) -> Token | Finished:
        """Wait for the next event; after `Finished` nothing more comes. With `timeout_s=0` it never blocks.

        Raises:
            TimeoutError: nothing came in time, or nothing is there yet; the request goes on.
        """

    def cancel(self) -> None:
        """Give the request up; its place is free at the next step. Never blocks; harmless when finished."""


class QueueFullError(Exception):
    """More requests wait than may.

    Attributes:
        retry_after_s: a guess at when there will be room.
    """

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__(f"{waiting} requests wait already")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Load:
    """What an engine is doing.

    Attributes:
        running: requests being generated.
        waiting: requests in the queue.
        generated_tokens: since the start.
        prompt_tokens: since the start.
        finished: requests ended since the start, by reason.
    """

    running: int
    waiting: int
    generated_tokens: int
    prompt_tokens: int
    finished: dict[str, int]


class Generator(Protocol):
    """What the HTTP side knows of an engine: one model, many requests at once."""

    opened: OpenModel

    def submit(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        *,
        timeout_s: float | None = None,
        on_event: Callable[[], None] | None = None,
    ) -> Ticket:
        """Queue a request; returns at once.

        Args:
            prompt_ids: to continue; at least one.
            sampling: how tokens are drawn.
            timeout_s: from now, the time in the queue included; None for the generator's own limit, which may be none.
            on_event: called after every event, `Finished` too, once `Ticket.next(0)` would return it; from any thread,
                without a lock held. It never blocks and raises nothing.
        Raises:
            QueueFullError: too many wait.
            ConfigError: the prompt is empty, too long with max_tokens for the model, or a setting is out of range.
        """

    def load(self) -> Load:
        """Figures for /metrics."""

    def close(self) -> None:
        """End what runs (`cancelled`) and stop working."""

"""What is asked of an engine, and the events that answer it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from weftlm.config import Section
from weftlm.errors import ConfigError

FinishReason = Literal["stop", "length", "timeout", "cancelled", "error"]


class Sampling(Section):
    """How tokens are drawn; a value out of range is a pydantic `ValidationError`, which is a ValueError.

    Attributes:
        max_tokens: Maximum number of tokens to generate.
        temperature: 0 takes the most likely token, the lowest id among equals.
        top_p: Smallest set of most likely tokens with at least this probability.
        seed: Random seed of the draw; None draws one. The same seed, prompt and model give the same tokens whatever
            else runs.
        stop: Texts that end the answer and are not part of it.
        logprobs: Number of most likely tokens reported for each generated one; None for no log-probabilities.
        ignore_eos: Whether generation goes on after the end-of-text token, up to max_tokens.
    """

    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    logprobs: int | None = Field(None, ge=0, le=20)
    ignore_eos: bool = False


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        id: Token id.
        text: Text it adds to the answer; empty while a character or a stop text is incomplete.
        logprob: Nats, of the model's own distribution, before temperature and top_p; None where not asked for.
        top: (token id, nats) of the most likely tokens, most likely first; empty where not asked for.
    """

    id: int
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Attributes:
        reason: `stop` (a stop text or end of text), `length`, `timeout`, `cancelled`, or `error`.
        text: Text held back until now, because it might have become a stop text.
        message: Description of the error; empty unless the reason is `error`.
    """

    reason: FinishReason
    text: str = ""
    message: str = ""


Event = Token | Finished


class QueueFullError(Exception):
    """The queue has no room for another request."""


class EngineClosedError(ConfigError):
    """The engine takes no more requests."""


class PromptError(ConfigError):
    """A prompt that the model cannot continue; `code` is a name for programs."""

    code = "invalid_value"


class ContextLengthError(PromptError):
    """A prompt and its max_tokens exceed the model's context."""

    code = "context_length_exceeded"


def check_prompt(prompt_ids: Sequence[int], max_tokens: int, vocab_size: int, max_length: int | None) -> None:
    """Check a prompt against a model.

    Args:
        prompt_ids: Token ids of the prompt.
        max_tokens: Maximum number of tokens to generate.
        vocab_size: V.
        max_length: Number of tokens the model can read; None if unknown.
    Raises:
        ContextLengthError: The prompt is too long with max_tokens.
        PromptError: The prompt is empty, or holds a number that is no token id.
    """
    if not prompt_ids:
        raise PromptError("the prompt is empty; give at least one token")
    total = len(prompt_ids) + max_tokens
    if max_length is not None and total > max_length:
        raise ContextLengthError(
            f"a prompt of {len(prompt_ids):,} tokens and max_tokens {max_tokens:,} make {total:,}; the model reads "
            f"{max_length:,} tokens at most: shorten the prompt or lower max_tokens"
        )
    if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        wrong = min(prompt_ids) if min(prompt_ids) < 0 else max(prompt_ids)
        raise PromptError(f"the prompt holds {wrong}, which is no token id; ids go from 0 to {vocab_size - 1}")

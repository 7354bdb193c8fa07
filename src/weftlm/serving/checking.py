"""What a request may ask for, checked before it is queued."""

from __future__ import annotations

import math
from collections.abc import Sequence

from weftlm.errors import ConfigError
from weftlm.serving.request import Sampling

MOST_LOGPROBS = 20


def check_request(prompt_ids: Sequence[int], sampling: Sampling, vocab_size: int, max_length: int | None) -> None:
    """Check a request against a model.

    Args:
        prompt_ids: of the prompt.
        sampling: its settings.
        vocab_size: V; ids are below it.
        max_length: tokens the model can read; None where it does not say.
    Raises:
        ConfigError: the prompt is empty, holds something that is no token id, or is too long with max_tokens; or a
            setting is out of range.
    """
    if not prompt_ids:
        raise ConfigError("the prompt is empty; give one token at least")
    for place, token in enumerate(prompt_ids):
        if not _whole(token) or not 0 <= token < vocab_size:
            raise ConfigError(
                f"the prompt's token {place} is {token!r}; ids are whole numbers from 0 to {vocab_size - 1}"
            )
    _check_sampling(sampling)
    total = len(prompt_ids) + sampling.max_tokens
    if max_length is not None and total > max_length:
        raise ConfigError(
            f"a prompt of {len(prompt_ids)} tokens and max_tokens {sampling.max_tokens} make {total}; the model reads "
            f"{max_length} at most: shorten the prompt or lower max_tokens"
        )


def check_timeout(timeout_s: float | None) -> None:
    """Check a request's own time limit.

    Raises:
        ConfigError: it is not a positive number.
    """
    if timeout_s is not None and not (_number(timeout_s) and timeout_s > 0):
        raise ConfigError(f"timeout_s is {timeout_s!r}; it must be a positive number of seconds")


def _check_sampling(asked: Sampling) -> None:
    stops: object = asked.stop  # callers without a type checker may give anything
    texts = isinstance(stops, tuple | list) and all(isinstance(stop, str) and stop for stop in stops)
    seed, top = asked.seed, asked.logprobs
    rules = {
        "max_tokens": (_whole(asked.max_tokens) and asked.max_tokens >= 1, "a whole number, 1 or more"),
        "temperature": (
            _number(asked.temperature) and asked.temperature >= 0, "0 (the most likely token) or a positive number",
        ),
        "top_p": (_number(asked.top_p) and 0 < asked.top_p <= 1, "above 0 and at most 1"),
        "seed": (
            seed is None or (_whole(seed) and -(1 << 63) <= seed < 1 << 64),
            "a whole number of at most 64 bits, or None",
        ),
        "stop": (texts, "a tuple of texts of one character at least"),
        "logprobs": (
            top is None or (_whole(top) and 0 <= top <= MOST_LOGPROBS), f"from 0 to {MOST_LOGPROBS}, or None for none",
        ),
    }  # fmt: skip
    for name, (fits, allowed) in rules.items():
        if not fits:
            raise ConfigError(f"{name} is {getattr(asked, name)!r}; it must be {allowed}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

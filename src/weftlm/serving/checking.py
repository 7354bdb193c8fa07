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


def _check_sampling(sampling: Sampling) -> None:
    if not _whole(sampling.max_tokens) or sampling.max_tokens < 1:
        raise ConfigError(f"max_tokens is {sampling.max_tokens!r}; it must be a whole number, 1 or more")
    if not _number(sampling.temperature) or sampling.temperature < 0:
        raise ConfigError(
            f"temperature is {sampling.temperature!r}; it must be 0 (the most likely token) or a positive number"
        )
    if not _number(sampling.top_p) or not 0 < sampling.top_p <= 1:
        raise ConfigError(f"top_p is {sampling.top_p!r}; it must be above 0 and at most 1")
    if sampling.seed is not None and not (_whole(sampling.seed) and -(1 << 63) <= sampling.seed < 1 << 64):
        raise ConfigError(f"seed is {sampling.seed!r}; it must be a whole number of at most 64 bits, or None")
    stops: object = sampling.stop  # callers without a type checker may give anything
    if not isinstance(stops, tuple | list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ConfigError(f"stop is {sampling.stop!r}; it must hold texts of one character at least")
    if sampling.logprobs is not None and not (_whole(sampling.logprobs) and 0 <= sampling.logprobs <= MOST_LOGPROBS):
        raise ConfigError(f"logprobs is {sampling.logprobs!r}; it must be from 0 to {MOST_LOGPROBS}, or None for none")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

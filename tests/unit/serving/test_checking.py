"""What is asked is checked before it is queued."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from weftlm.errors import ConfigError
from weftlm.serving.checking import check_request, check_timeout
from weftlm.serving.request import Sampling


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"seed": 1 << 64}, "at most 64 bits"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"stop": ("a", "")}, "one character at least"),
        ({"stop": "END"}, "it must be a tuple of texts"),
        ({"logprobs": 21}, "from 0 to 20"),
        ({"logprobs": -1}, "from 0 to 20"),
        ({"max_tokens": 8}, "make 11; the model reads 10"),
    ],
)
def test_settings_out_of_range(changed: dict[str, Any], message: str) -> None:
    sampling = Sampling(max_tokens=7)
    check_request([1, 2, 3], sampling, vocab_size=4, max_length=10)
    with pytest.raises(ConfigError, match=message):
        check_request([1, 2, 3], replace(sampling, **changed), vocab_size=4, max_length=10)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([1, 4], "token 1 is 4"), ([-1], "token 0 is -1"), ([1.0], "is 1.0"), ([True], "is True")],
)
def test_prompts_that_are_none(prompt: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_request(prompt, Sampling(), vocab_size=4, max_length=None)


def test_a_model_without_a_limit_takes_any_length() -> None:
    check_request([0] * 5000, Sampling(max_tokens=100_000), vocab_size=1, max_length=None)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.nan, math.inf, True])
def test_time_limits_that_are_none(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="positive number of seconds"):
        check_timeout(timeout_s)

import math

import pytest
import torch

from weftlm.errors import ConfigError
from weftlm.mixture.policy import MixtureSetting, build_policy


def init(tokens, **keys):
    policy = build_policy({"policy": "proportional", **keys})
    domains = tuple("abc"[: len(tokens)])
    return policy.weights(policy.init(MixtureSetting(domains, torch.tensor(tokens, dtype=torch.float64)))).tolist()


def test_token_shares():
    assert init([100.0, 300.0]) == pytest.approx([0.25, 0.75], rel=1e-14)


def test_a_temperature_below_one_lifts_small_domains():
    assert init([100.0, 900.0], temperature=0.5) == pytest.approx([0.25, 0.75], rel=1e-14)


def test_a_domain_without_tokens_is_not_drawn():
    assert init([0.0, 10.0, 10.0], temperature=0.0) == [0.0, 0.5, 0.5]


def test_large_exponents_do_not_overflow():
    assert init([1e12, 1e3], temperature=100.0) == [1.0, 0.0]


@pytest.mark.parametrize("tokens", [[0.0, 0.0], [-1.0, 2.0], [math.nan, 2.0], [math.inf, 2.0]])
def test_impossible_counts_are_an_error(tokens):
    with pytest.raises(ConfigError, match="tokens per domain are"):
        init(tokens)

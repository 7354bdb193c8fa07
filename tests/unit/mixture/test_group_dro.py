import math

import pytest
import torch

from weftlm.errors import ConfigError, NumericsError
from weftlm.mixture.policy import MixtureSetting, Report, build_policy

SETTING = MixtureSetting(("a", "b"), torch.tensor([4.0, 16.0], dtype=torch.float64))


def report(losses, tokens=(1.0, 1.0)):
    values = torch.tensor(losses, dtype=torch.float64)
    return Report(100, torch.tensor(tokens, dtype=torch.float64), losses_D=values)


def test_the_worst_domain_gains():
    policy = build_policy({"policy": "group_dro", "eta": 2.0})
    state = policy.update(policy.init(SETTING), report([math.log(3.0) / 2, 0.0]))
    assert policy.weights(state).tolist() == pytest.approx([0.75, 0.25], rel=1e-14)


def test_the_adjustment_lifts_small_domains():
    policy = build_policy({"policy": "group_dro", "adjustment": 4 * math.log(3.0)})
    state = policy.init(SETTING)
    assert state.offsets_D.tolist() == pytest.approx([2 * math.log(3.0), math.log(3.0)], rel=1e-14)
    state = policy.update(state, report([1.0, 1.0]))
    assert policy.weights(state).tolist() == pytest.approx([0.75, 0.25], rel=1e-14)


def test_the_adjustment_needs_tokens():
    policy = build_policy({"policy": "group_dro", "adjustment": 1.0})
    with pytest.raises(ConfigError, match="b has none"):
        policy.init(MixtureSetting(("a", "b"), torch.tensor([4.0, 0.0], dtype=torch.float64)))


def test_a_domain_not_drawn_keeps_its_last_loss_and_one_never_drawn_its_weight():
    policy = build_policy({"policy": "group_dro"})
    state = policy.update(policy.init(SETTING), report([2.0, math.nan], tokens=(1.0, 0.0)))
    assert policy.weights(state).tolist() == [0.5, 0.5]
    state = policy.update(state, report([math.nan, 1.0], tokens=(0.0, 1.0)))
    assert state.losses_D.tolist() == [2.0, 1.0]
    expected = math.e / (math.e + 1.0)
    assert policy.weights(state).tolist() == pytest.approx([expected, 1.0 - expected], rel=1e-14)


def test_an_infinite_loss_is_an_error_that_names_the_domain():
    policy = build_policy({"policy": "group_dro"})
    with pytest.raises(NumericsError, match="losses are not finite for a: inf"):
        policy.update(policy.init(SETTING), report([math.inf, 1.0]))


def test_losses_of_another_number_of_domains_are_an_error():
    policy = build_policy({"policy": "group_dro"})
    with pytest.raises(ConfigError, match=r"\(3,\) losses; policy 'group_dro' has 2 domains"):
        policy.update(policy.init(SETTING), report([1.0, 1.0, 1.0], tokens=(1.0, 1.0, 1.0)))

import math

import pytest
import torch

from weftlm.errors import NumericsError
from weftlm.mixture.policy import MixtureSetting, Report, build_policy

SETTING = MixtureSetting(("a", "b"), torch.ones(2, dtype=torch.float64))


def report(excess, tokens=(1.0, 1.0)):
    values = torch.tensor(excess, dtype=torch.float64)
    return Report(100, torch.tensor(tokens, dtype=torch.float64), values, values, values)


def test_it_moves_to_the_domain_that_is_behind():
    policy = build_policy({"policy": "doremi", "smoothing": 0.0})
    state = policy.update(policy.init(SETTING), report([math.log(3.0), 0.0]))
    assert policy.weights(state).tolist() == pytest.approx([0.75, 0.25], rel=1e-14)


def test_smoothing_bounds_every_weight_from_below():
    policy = build_policy({"policy": "doremi", "smoothing": 0.1})
    state = policy.init(SETTING)
    for _ in range(20):
        state = policy.update(state, report([40.0, 0.0]))
    assert policy.weights(state).tolist() == pytest.approx([0.95, 0.05], rel=1e-6)


def test_a_domain_not_drawn_keeps_its_last_excess_loss():
    policy = build_policy({"policy": "doremi"})
    state = policy.update(policy.init(SETTING), report([0.5, 0.25]))
    state = policy.update(state, report([math.nan, 1.0], tokens=(0.0, 1.0)))
    assert state.excess_D.tolist() == [0.5, 1.0]


def test_a_broken_loss_of_a_drawn_domain_is_an_error():
    policy = build_policy({"policy": "doremi"})
    with pytest.raises(NumericsError, match="losses are not finite for b: nan"):
        policy.update(policy.init(SETTING), report([0.5, math.nan]))


def test_both_signals_are_asked_for():
    assert build_policy({"policy": "doremi"}).needs == {"losses", "reference_losses"}

import math

import pytest
import torch

from weftlm.mixture.odm import exploration
from weftlm.mixture.policy import MixtureSetting, Report, build_policy

DOMAINS = ("a", "b", "c", "d")
SETTING = MixtureSetting(DOMAINS, torch.ones(4, dtype=torch.float64))


def report(losses, step=100):
    values = torch.tensor(losses, dtype=torch.float64)
    return Report(step, torch.where(values.isnan(), 0.0, 64.0), losses_D=values)


def test_exploration_starts_at_uniform_and_falls_as_the_root_of_turns():
    assert exploration(4, 0) == 0.25
    assert exploration(4, 1) == 0.25
    assert exploration(4, 100) == pytest.approx(math.sqrt(math.log(4) / 400))
    assert exploration(1, 5) == 0.0


def test_rewards_are_importance_weighted_moving_averages_of_drawn_domains():
    policy = build_policy({"policy": "odm", "decay": 0.75})
    state = policy.update(policy.init(SETTING), report([2.0, math.nan, 1.0, 0.0]))
    assert state.rewards_D.tolist() == [0.25 * 2.0 / 0.25, 0.0, 0.25 * 1.0 / 0.25, 0.0]


def test_every_domain_keeps_the_share_of_exploration():
    policy = build_policy({"policy": "odm"})
    state = policy.init(SETTING)
    for turn in range(1, 60):
        state = policy.update(state, report([8.0, 0.1, 0.1, 0.1]))
        assert float(policy.weights(state).min()) >= exploration(4, turn) - 1e-15
    assert int(policy.weights(state).argmax()) == 0
    assert float(policy.weights(state)[0]) > 0.3


def test_nothing_is_learned_during_the_warm_up():
    policy = build_policy({"policy": "odm", "warmup_steps": 200})
    state = policy.update(policy.init(SETTING), report([8.0, 0.0, 0.0, 0.0], step=200))
    assert policy.weights(state).tolist() == [0.25] * 4
    assert (state.turns, state.skipped) == (0, 1)
    state = policy.update(state, report([8.0, 0.0, 0.0, 0.0], step=300))
    assert state.turns == 1

import math

import pytest
import torch

from weftlm.mixture.policy import Alignment, MixtureSetting, Report, build_policy

SETTING = MixtureSetting(("a", "b"), torch.ones(2, dtype=torch.float64))


def probe(*dots):
    values = torch.tensor(dots, dtype=torch.float64)
    return Report(
        100, torch.ones(2), alignment=Alignment(values, torch.ones(2, dtype=torch.int64), 1.0, batch_norm=1.0)
    )


@pytest.mark.parametrize(("target", "signal"), [(False, "generalist_alignment"), (True, "target_alignment")])
def test_the_direction_it_asks_for(target, signal):
    assert build_policy({"policy": "doge", "target": target}).needs == {signal}


def test_one_step_has_no_ema_and_no_floor():
    policy = build_policy({"policy": "doge", "eta": 1.0})
    state = policy.update(policy.init(SETTING), probe(math.log(3.0), 0.0))
    assert policy.weights(state).tolist() == pytest.approx([0.75, 0.25], rel=1e-14)


def test_the_average_starts_with_the_first_update():
    policy = build_policy({"policy": "doge", "eta": 1.0, "sample": "average"})
    state = policy.init(SETTING)
    assert policy.weights(state).tolist() == [0.5, 0.5]
    state = policy.update(state, probe(math.log(3.0), 0.0))
    assert policy.weights(state).tolist() == pytest.approx([0.75, 0.25], rel=1e-14)
    state = policy.update(state, probe(-math.log(3.0), 0.0))
    assert policy.weights(state).tolist() == pytest.approx([0.625, 0.375], rel=1e-14)
    assert policy.diagnostics(state)["average"] == policy.weights(state).tolist()


def test_a_probe_that_tells_nothing_does_not_enter_the_average():
    policy = build_policy({"policy": "doge", "sample": "average"})
    state = policy.update(policy.init(SETTING), probe(1.0, 0.0))
    nothing = Alignment(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.int64), 0.0, batch_norm=1.0)
    after = policy.update(state, Report(200, torch.ones(2), alignment=nothing))
    assert torch.equal(policy.weights(after), policy.weights(state))
    assert (after.updates, after.skipped) == (1, 1)

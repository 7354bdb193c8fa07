import torch

from weftlm.mixture.policy import MixtureSetting, Report, build_policy


def test_sizes_do_not_matter_and_nothing_ever_moves():
    policy = build_policy({"policy": "uniform"})
    state = policy.init(MixtureSetting(("a", "b", "c", "d"), torch.tensor([1.0, 9.0, 5e9, 0.0], dtype=torch.float64)))
    assert policy.needs == frozenset()
    assert policy.update(state, Report(step=1, tokens_D=torch.ones(4))) is state
    assert policy.weights(state).tolist() == [0.25] * 4

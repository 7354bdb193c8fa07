import pytest
import torch

from weftlm.errors import ConfigError
from weftlm.mixture.policy import MixtureSetting, build_policy


def init(histogram, **keys):
    policy = build_policy({"policy": "importance", **keys})
    values = None if histogram is None else torch.tensor(histogram, dtype=torch.float64)
    setting = MixtureSetting(("a", "b", "c", "d"), torch.ones(4, dtype=torch.float64), target_histogram_D=values)
    return policy.weights(policy.init(setting)).tolist()


def test_the_histogram_is_taken_as_it_is():
    assert init([0.5, 0.0, 0.25, 0.25]) == [0.5, 0.0, 0.25, 0.25]


def test_smoothing_mixes_uniform_in():
    assert init([1.0, 0.0, 0.0, 0.0], smoothing=0.4) == pytest.approx([0.7, 0.1, 0.1, 0.1])


def test_a_missing_histogram_is_an_error():
    with pytest.raises(ConfigError, match="'importance' needs the signal 'target_histogram'"):
        init(None)


@pytest.mark.parametrize("histogram", [[0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [1.5, -0.5, 0.0, 0.0]])
def test_a_histogram_that_is_no_distribution_over_the_domains_is_an_error(histogram):
    with pytest.raises(ConfigError, match="must hold 4 shares"):
        init(histogram)

import pytest
import torch

from weftlm.errors import ConfigError
from weftlm.mixture.policy import MixtureSetting, build_policy

SETTING = MixtureSetting(domains=("code", "prose", "law"), tokens_D=torch.ones(3, dtype=torch.float64))


def init(**weights):
    policy = build_policy({"policy": "static", "weights": weights})
    return policy.weights(policy.init(SETTING))


def test_weights_follow_the_order_of_the_domains():
    assert init(law=0.5, code=0.25, prose=0.25).tolist() == [0.25, 0.25, 0.5]


def test_zero_leaves_a_domain_out():
    assert init(law=0.0, code=0.25, prose=0.75).tolist() == [0.25, 0.75, 0.0]


def test_weights_are_required():
    with pytest.raises(ConfigError, match=r"mixture\.weights: missing"):
        build_policy({"policy": "static"})


def test_an_unknown_name_is_an_error_with_a_suggestion():
    with pytest.raises(ConfigError, match="'pros' is no domain; did you mean 'prose'"):
        init(code=0.5, pros=0.25, law=0.25)


def test_a_missing_name_is_an_error():
    with pytest.raises(ConfigError, match="2 of 3 domains; missing: law"):
        init(code=0.5, prose=0.5)


def test_a_sum_that_is_not_one_is_an_error():
    with pytest.raises(ConfigError, match=r"sum to 0\.97 over 3 domains; must be 1 ± 1e-06"):
        init(code=0.5, prose=0.25, law=0.22)


def test_rounded_thirds_pass_and_sum_to_one():
    assert float(init(code=0.3333333, prose=0.3333333, law=0.3333334).sum()) == pytest.approx(1.0, abs=1e-15)


def test_a_negative_weight_is_an_error():
    with pytest.raises(ConfigError, match=r"mixture\.weights\.law: must be at least 0"):
        init(code=0.5, prose=0.75, law=-0.25)

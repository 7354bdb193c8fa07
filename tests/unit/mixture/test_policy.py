import json
import math

import pytest
import torch

from weftlm.errors import CheckpointError, ConfigError, NumericsError
from weftlm.mixture.config import policies
from weftlm.mixture.policy import (
    MixtureSetting,
    build_policy,
    entropy,
    exponentiated_gradient,
    state_from_json,
    state_to_json,
    with_floor,
)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_every_policy_of_the_folder_is_found():
    expected = {"uniform", "static", "proportional", "importance", "dga", "doge", "doremi", "group_dro", "odm"}
    assert expected <= set(policies)


def test_build_policy_keeps_what_was_asked():
    policy = build_policy({"policy": "dga", "eta": 2.5, "update_every_steps": 20})
    assert (policy.config.policy, policy.config.eta, policy.config.update_every_steps) == ("dga", 2.5, 20)


def test_build_policy_suggests_a_name():
    with pytest.raises(ConfigError, match="unknown mixture policy 'doremy'; did you mean 'doremi'"):
        build_policy({"policy": "doremy"})


@pytest.mark.parametrize("value", [{}, {"policy": None}, {"policy": 3}])
def test_build_policy_lists_what_is_allowed_when_no_name_came(value):
    with pytest.raises(ConfigError, match=r"mixture\.policy is .*must be one of: dga, doge"):
        build_policy(value)


def test_build_policy_wants_a_mapping():
    with pytest.raises(ConfigError, match="must be a mapping"):
        build_policy("dga")


def test_build_policy_names_the_place_of_a_wrong_value():
    with pytest.raises(ConfigError, match=r"train\.mixture\.eta: must be above 0 \(got -1\)"):
        build_policy({"policy": "dga", "eta": -1}, where="train.mixture")


def test_build_policy_refuses_infinite_numbers():
    with pytest.raises(ConfigError, match="finite"):
        build_policy({"policy": "dga", "eta": math.inf})


def test_exponentiated_gradient_is_a_reweighted_softmax():
    moved = exponentiated_gradient(tensor(0.25, 0.75), tensor(math.log(3.0), 0.0))
    torch.testing.assert_close(moved, tensor(0.5, 0.5), rtol=1e-15, atol=0)


def test_exponentiated_gradient_leaves_an_unknown_entry_exactly_where_it_was():
    moved = exponentiated_gradient(tensor(0.1, 0.45, 0.45), tensor(math.nan, math.log(2.0), 0.0))
    assert float(moved[0]) == 0.1
    torch.testing.assert_close(moved[1:], tensor(0.6, 0.3), rtol=1e-15, atol=0)


def test_exponentiated_gradient_keeps_zeros_and_survives_a_mass_of_zero():
    assert exponentiated_gradient(tensor(0.0, 1.0), tensor(50.0, 0.0)).tolist() == [0.0, 1.0]
    assert exponentiated_gradient(tensor(0.0, 1.0), tensor(50.0, math.nan)).tolist() == [0.0, 1.0]


def test_exponentiated_gradient_does_not_overflow():
    assert exponentiated_gradient(tensor(0.5, 0.5), tensor(1e300, -1e300)).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_exponentiated_gradient_refuses_infinities(bad):
    with pytest.raises(NumericsError, match="infinity; lower eta"):
        exponentiated_gradient(tensor(0.5, 0.5), tensor(bad, 0.0))


def test_with_floor_and_entropy():
    assert with_floor(tensor(1.0, 0.0), 0.1).tolist() == pytest.approx([0.95, 0.05])
    assert entropy(tensor(0.5, 0.5)) == pytest.approx(math.log(2.0))
    assert entropy(tensor(1.0, 0.0)) == 0.0


def setting(*domains):
    return MixtureSetting(domains=domains, tokens_D=torch.ones(len(domains), dtype=torch.float64))


def test_a_saved_state_of_another_policy_is_refused():
    saved = state_to_json(build_policy({"policy": "odm"}).init(setting("a", "b")))
    with pytest.raises(CheckpointError, match="another policy"):
        state_from_json(build_policy({"policy": "dga"}).init(setting("a", "b")), saved)


def test_a_saved_state_of_other_domains_is_refused():
    policy = build_policy({"policy": "odm"})
    saved = state_to_json(policy.init(setting("a", "b")))
    with pytest.raises(CheckpointError, match="number of domains"):
        state_from_json(policy.init(setting("a", "b", "c")), saved)


def test_constant_fields_are_not_saved_and_come_back_from_the_template():
    policy = build_policy({"policy": "dga"})
    state = policy.init(setting("a", "b"))
    saved = json.loads(json.dumps(state_to_json(state)))
    assert "basis_ND" not in saved
    assert "groups" not in saved
    assert state_from_json(state, saved).groups == ("a", "b")

"""Choosing a policy by name, the mirror step, and states through JSON."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from weftlm.errors import CheckpointError, ConfigError, NumericsError
from weftlm.mixture.mirror import exponentiated_gradient
from weftlm.mixture.policy import MixtureSetting, build_policy, state_from_json, state_to_json

NAN = math.nan


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"policy": "doremy"}, "unknown mixture policy 'doremy'; did you mean 'doremi'"),
        ({}, r"mixture\.policy is .*must be one of: dga, doge"),
        ({"policy": 3}, r"mixture\.policy is .*must be one of: dga, doge"),
        ("dga", "must be a mapping"),
        ({"policy": "dga", "eta": -1}, r"mixture\.eta: must be above 0 \(got -1\)"),
        ({"policy": "dga", "eta": math.inf}, "finite"),
    ],
)
def test_what_names_no_policy_is_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        build_policy(value)


@pytest.mark.parametrize(
    ("weights", "exponents", "expected"),
    [
        ([0.25, 0.75], [math.log(3.0), 0.0], [0.5, 0.5]),
        ([0.1, 0.45, 0.45], [NAN, math.log(2.0), 0.0], [0.1, 0.6, 0.3]),  # unknown: exactly where it was
        ([0.0, 1.0], [50.0, 0.0], [0.0, 1.0]),
        ([0.0, 1.0], [50.0, NAN], [0.0, 1.0]),
        ([0.5, 0.5], [1e300, -1e300], [1.0, 0.0]),
    ],
)
def test_a_mirror_step_is_a_reweighted_softmax(weights, exponents, expected):
    moved = exponentiated_gradient(*(torch.tensor(each, dtype=torch.float64) for each in (weights, exponents)))
    assert moved.tolist() == pytest.approx(expected, rel=1e-15)
    assert [m for m, x in zip(moved.tolist(), exponents, strict=True) if math.isnan(x)] == [
        w for w, x in zip(weights, exponents, strict=True) if math.isnan(x)
    ]


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_a_mirror_step_refuses_infinities(bad):
    with pytest.raises(NumericsError, match="infinity; lower eta"):
        exponentiated_gradient(torch.tensor([0.5, 0.5]), torch.tensor([bad, 0.0]))


def test_a_saved_state_is_that_of_its_policy_and_domains_without_what_never_changes():
    def start(policy, *domains):
        built = build_policy({"policy": policy})
        return built.init(MixtureSetting(domains, torch.ones(len(domains), dtype=torch.float64)))

    with pytest.raises(CheckpointError, match="another policy"):
        state_from_json(start("dga", "a", "b"), state_to_json(start("odm", "a", "b")))
    with pytest.raises(CheckpointError, match="number of domains"):
        state_from_json(start("odm", "a", "b", "c"), state_to_json(start("odm", "a", "b")))
    state = start("dga", "a", "b")
    saved = json.loads(json.dumps(state_to_json(state)))
    assert not {"basis_ND", "groups"} & saved.keys()
    assert state_from_json(state, saved).groups == ("a", "b")


@dataclasses.dataclass(frozen=True)
class Foreign:
    """The state of a policy of another package."""

    weights_D: torch.Tensor
    memory: Any = ()


def test_a_state_of_another_package_keeps_its_tuples_and_what_json_cannot_give_back_is_refused_by_name():
    weights_D = torch.tensor([0.25, 0.75], dtype=torch.float64)
    state, template = Foreign(weights_D, (3, ("a", 0.1), (None, True))), Foreign(torch.zeros(2, dtype=torch.float64))
    back = state_from_json(template, json.loads(json.dumps(state_to_json(state))))
    assert torch.equal(back.weights_D, weights_D)
    assert back.memory == state.memory
    for odd in ({1: 2}, [1.0], (weights_D,), ((weights_D.numpy(),),)):
        with pytest.raises(
            ConfigError, match=r"test_policy\.Foreign cannot be saved: its field 'memory' is a (dict|list|tuple)"
        ):
            state_to_json(Foreign(weights_D, odd))

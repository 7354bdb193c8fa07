"""What the formulas and laws do not show of single policies: absent domains, limits, refusals.

Rules are compared with their papers in `tests/oracles/test_policy_formulas.py`; what all obey is in `tests/laws`.
"""

import math

import pytest
import torch

from weftlm.errors import ConfigError, NumericsError
from weftlm.mixture.odm import exploration
from weftlm.mixture.policy import Alignment, MixtureSetting, Report, build_policy

NAN = math.nan


def report(values, step=100):
    """Losses, of the reference and excess too; a domain without one was not drawn."""
    losses = torch.tensor(values, dtype=torch.float64)
    return Report(step, torch.where(losses.isnan(), 0.0, 64.0), losses, losses, losses)


def start(policy, *tokens, histogram=None, **keys):
    built = build_policy({"policy": policy, **keys})
    tokens_D = torch.tensor(tokens, dtype=torch.float64)
    histogram_D = None if histogram is None else torch.tensor(histogram, dtype=torch.float64)
    return built, built.init(MixtureSetting(tuple("abcd"[: len(tokens)]), tokens_D, histogram_D))


def weights(policy, *tokens, **keys):
    built, state = start(policy, *tokens, **keys)
    return built.weights(state).tolist()


# -- policies that never move -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "tokens", "keys", "expected"),
    [
        ("uniform", [1.0, 9.0, 5e9, 0.0], {}, [0.25] * 4),
        ("proportional", [100.0, 300.0], {}, [0.25, 0.75]),
        ("proportional", [0.0, 9.0, 10.0], {"temperature": 0.0}, [0.0, 0.5, 0.5]),
        ("proportional", [1e12, 1e3], {"temperature": 100.0}, [1.0, 0.0]),
        ("static", [1.0] * 3, {"weights": {"c": 0.75, "a": 0.25, "b": 0.0}}, [0.25, 0.0, 0.75]),
        ("static", [1.0] * 3, {"weights": {"a": 0.3333333, "b": 0.3333333, "c": 0.3333334}}, [1 / 3] * 3),
    ],
)
def test_weights_that_never_move(policy, tokens, keys, expected):
    built, state = start(policy, *tokens, **keys)
    assert built.weights(state).tolist() == pytest.approx(expected, rel=1e-6)
    assert sum(built.weights(state).tolist()) == pytest.approx(1.0, abs=1e-15)
    assert built.needs == frozenset()
    assert built.update(state, Report(step=1, tokens_D=torch.ones(len(tokens)))) is state


@pytest.mark.parametrize(
    ("policy", "tokens", "keys", "message"),
    [
        ("proportional", [0.0, 0.0], {}, "tokens per domain are"),
        ("proportional", [-1.0, 2.0], {}, "tokens per domain are"),
        ("proportional", [NAN, 2.0], {}, "tokens per domain are"),
        ("importance", [1.0] * 4, {"histogram": [0.5, 0.5]}, "must hold 4 shares"),
        ("importance", [1.0] * 4, {"histogram": [0.5] * 4}, "must hold 4 shares"),
        ("importance", [1.0] * 4, {"histogram": [1.5, -0.5, 0.0, 0.0]}, "must hold 4 shares"),
        ("static", [1.0] * 3, {}, r"mixture\.weights: missing"),
        ("static", [1.0] * 3, {"weights": {"a": 0.5, "bb": 0.25, "c": 0.25}}, "'bb' is no domain; did you mean 'b'"),
        ("static", [1.0] * 3, {"weights": {"a": 0.5, "b": 0.5}}, "2 of 3 domains; missing: c"),
        ("static", [1.0] * 3, {"weights": {"a": 0.5, "b": 0.25, "c": 0.22}}, r"sum to 0\.97 over 3 domains; must be 1"),
        ("static", [1.0] * 3, {"weights": {"a": 0.5, "b": 0.75, "c": -0.25}}, r"mixture\.weights\.c: must be at least"),
        ("group_dro", [4.0, 0.0], {"adjustment": 1.0}, "b has none"),
    ],
)
def test_what_gives_no_mixture_of_the_domains_is_refused(policy, tokens, keys, message):
    with pytest.raises(ConfigError, match=message):
        weights(policy, *tokens, **keys)


# -- policies driven by losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["doremi", "group_dro", "odm"])
def test_a_broken_loss_of_a_drawn_domain_is_an_error_that_names_it(name):
    policy, state = start(name, 1.0, 1.0)
    with pytest.raises(NumericsError, match="losses are not finite for b: inf"):
        policy.update(state, report([0.5, math.inf]))
    with pytest.raises(ConfigError, match=rf"\(3,\) losses; policy '{name}' has 2 domains"):
        policy.update(state, report([1.0, 1.0, 1.0]))


def test_a_bandit_explores_and_learns_nothing_during_the_warm_up():
    assert [exploration(4, 0), exploration(4, 1), exploration(1, 5)] == [0.25, 0.25, 0.0]
    assert exploration(4, 100) == pytest.approx(math.sqrt(math.log(4) / 400))
    policy, state = start("odm", *[1.0] * 4, warmup_steps=200)
    state = policy.update(state, report([8.0, 0.0, 0.0, 0.0], step=200))
    assert policy.weights(state).tolist() == [0.25] * 4
    assert (state.turns, state.skipped) == (0, 1)
    for turn in range(1, 60):
        state = policy.update(state, report([8.0, 0.1, 0.1, 0.1], step=200 + turn))
        assert float(policy.weights(state).min()) >= exploration(4, turn) - 1e-15
    assert float(policy.weights(state)[0]) > 0.3


def test_a_probe_that_tells_nothing_does_not_enter_doges_average():
    policy, state = start("doge", 1.0, 1.0, sample="average")

    def probe(direction_norm):
        dots = torch.tensor([1.0, 0.0], dtype=torch.float64) * direction_norm
        alignment = Alignment(dots, torch.ones(2, dtype=torch.int64), direction_norm, batch_norm=1.0)
        return Report(100, torch.ones(2), alignment=alignment)

    state = policy.update(state, probe(1.0))
    after = policy.update(state, probe(0.0))
    assert torch.equal(policy.weights(after), policy.weights(state))
    assert (after.updates, after.skipped) == (1, 1)
    assert policy.diagnostics(after)["average"] == policy.weights(state).tolist()

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


def setting(*tokens, **more):
    return MixtureSetting(tuple("abcd"[: len(tokens)]), torch.tensor(tokens, dtype=torch.float64), **more)


def report(values, step=100):
    """Losses, of the reference and excess too; a domain without one was not drawn."""
    losses = torch.tensor(values, dtype=torch.float64)
    return Report(step, torch.where(losses.isnan(), 0.0, 64.0), losses, losses, losses)


def start(policy, *tokens, **keys):
    built = build_policy({"policy": policy, **keys})
    return built, built.init(setting(*tokens))


def weights(policy, *tokens, **keys):
    built, state = start(policy, *tokens, **keys)
    return built.weights(state).tolist()


# -- policies that never move -----------------------------------------------------------------------------------------


def test_uniform_ignores_sizes_and_never_moves():
    policy, state = start("uniform", 1.0, 9.0, 5e9, 0.0)
    assert policy.needs == frozenset()
    assert policy.update(state, Report(step=1, tokens_D=torch.ones(4))) is state
    assert policy.weights(state).tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("tokens", "temperature", "expected"),
    [([100.0, 300.0], 1.0, [0.25, 0.75]), ([0.0, 9.0, 10.0], 0.0, [0.0, 0.5, 0.5]), ([1e12, 1e3], 100.0, [1.0, 0.0])],
)
def test_proportional_leaves_out_empty_domains_and_does_not_overflow(tokens, temperature, expected):
    assert weights("proportional", *tokens, temperature=temperature) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("tokens", [[0.0, 0.0], [-1.0, 2.0], [NAN, 2.0], [math.inf, 2.0]])
def test_proportional_refuses_impossible_counts(tokens):
    with pytest.raises(ConfigError, match="tokens per domain are"):
        weights("proportional", *tokens)


@pytest.mark.parametrize("histogram", [[0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [1.5, -0.5, 0.0, 0.0]])
def test_importance_refuses_what_is_no_histogram_of_the_domains(histogram):
    histogram_D = torch.tensor(histogram, dtype=torch.float64)
    with pytest.raises(ConfigError, match="must hold 4 shares"):
        build_policy({"policy": "importance"}).init(setting(1.0, 1.0, 1.0, 1.0, target_histogram_D=histogram_D))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, r"mixture\.weights: missing"),
        ({"a": 0.5, "bb": 0.25, "c": 0.25}, "'bb' is no domain; did you mean 'b'"),
        ({"a": 0.5, "b": 0.5}, "2 of 3 domains; missing: c"),
        ({"a": 0.5, "b": 0.25, "c": 0.22}, r"sum to 0\.97 over 3 domains; must be 1 ± 1e-06"),
        ({"a": 0.5, "b": 0.75, "c": -0.25}, r"mixture\.weights\.c: must be at least 0"),
    ],
)
def test_static_refuses_weights_that_are_no_mixture_of_the_domains(written, message):
    with pytest.raises(ConfigError, match=message):
        weights("static", 1.0, 1.0, 1.0, **({} if written is None else {"weights": written}))


def test_static_takes_names_in_any_order_zeros_and_rounded_thirds():
    assert weights("static", 1.0, 1.0, 1.0, weights={"c": 0.75, "a": 0.25, "b": 0.0}) == [0.25, 0.0, 0.75]
    thirds = {"a": 0.3333333, "b": 0.3333333, "c": 0.3333334}
    assert sum(weights("static", 1.0, 1.0, 1.0, weights=thirds)) == pytest.approx(1.0, abs=1e-15)


# -- policies driven by losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kept"), [("doremi", "excess_D"), ("group_dro", "losses_D")])
def test_a_domain_not_drawn_keeps_its_last_loss_and_one_never_drawn_its_weight(name, kept):
    policy, state = start(name, 4.0, 16.0, **({"smoothing": 0.0} if name == "doremi" else {}))
    state = policy.update(state, report([2.0, NAN]))
    assert policy.weights(state).tolist() == [0.5, 0.5]
    state = policy.update(state, report([NAN, 1.0]))
    assert getattr(state, kept).tolist() == [2.0, 1.0]
    expected = math.e / (math.e + 1.0)
    assert policy.weights(state).tolist() == pytest.approx([expected, 1.0 - expected], rel=1e-14)


def test_smoothing_bounds_every_weight_from_below():
    policy, state = start("doremi", 1.0, 1.0, smoothing=0.1)
    for _ in range(20):
        state = policy.update(state, report([40.0, 0.0]))
    assert policy.weights(state).tolist() == pytest.approx([0.95, 0.05], rel=1e-6)


@pytest.mark.parametrize("name", ["doremi", "group_dro", "odm"])
def test_a_broken_loss_of_a_drawn_domain_is_an_error_that_names_it(name):
    policy, state = start(name, 1.0, 1.0)
    with pytest.raises(NumericsError, match="losses are not finite for b: inf"):
        policy.update(state, report([0.5, math.inf]))
    with pytest.raises(ConfigError, match=rf"\(3,\) losses; policy '{name}' has 2 domains"):
        policy.update(state, report([1.0, 1.0, 1.0]))


def test_the_adjustment_lifts_small_domains_and_needs_tokens():
    policy, state = start("group_dro", 4.0, 16.0, adjustment=4 * math.log(3.0))
    assert policy.weights(policy.update(state, report([1.0, 1.0]))).tolist() == pytest.approx([0.75, 0.25], rel=1e-14)
    with pytest.raises(ConfigError, match="b has none"):
        start("group_dro", 4.0, 0.0, adjustment=1.0)


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


# -- DoGE -------------------------------------------------------------------------------------------------------------


def test_a_probe_that_tells_nothing_does_not_enter_the_average():
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
    assert build_policy({"policy": "doge", "target": True}).needs == {"target_alignment"}

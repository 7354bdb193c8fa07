"""Channel capacity: known channels, brackets, estimates from samples."""

import math

import numpy as np
import pytest
from support.gating import random_problem

from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.gating import channel_capacity, sampled_capacity
from weftlm.gating.mixtures import Box, Vertices


def test_disjoint_domains_carry_log_d():
    found = channel_capacity(np.log(np.full((1, 2), 0.5)))
    assert found.value == pytest.approx(0.0, abs=1e-12)
    P = np.kron(np.eye(4), [0.25, 0.75])
    found = channel_capacity(P)
    assert found.value == pytest.approx(math.log(4))
    assert found.lam_D == pytest.approx([0.25] * 4)
    assert found.kind == "exact"


def test_the_binary_symmetric_channel():
    e = 0.11
    found = channel_capacity([[1 - e, e], [e, 1 - e]])
    assert found.value == pytest.approx(math.log(2) + e * math.log(e) + (1 - e) * math.log(1 - e), abs=1e-9)


def test_the_z_channel_has_an_uneven_input():
    # C = log(1 + (1 - f) f^(f / (1 - f))) for the channel that turns 1 into 0 with probability f.
    f = 0.5
    found = channel_capacity([[1.0, 0.0], [f, 1 - f]])
    assert found.value == pytest.approx(math.log(1 + (1 - f) * f ** (f / (1 - f))), abs=1e-8)
    assert found.lam_D == pytest.approx([0.6, 0.4], abs=1e-3)


def test_a_repeated_domain_adds_nothing_and_the_bracket_holds_when_cut_short():
    P, _ = random_problem(0)
    whole = channel_capacity(P)
    assert channel_capacity(np.vstack([P, P[:1]])).value == pytest.approx(whole.value, abs=1e-7)
    cut = channel_capacity(P, max_iterations=3)
    assert cut.iterations == 3
    assert cut.value <= whole.value <= cut.value + cut.gap


def test_samples_estimate_it():
    P, _ = random_problem(1)
    r = np.random.default_rng(0)
    scores = [np.log(P.T[r.choice(8, 20_000, p=row)]) for row in P]
    found = sampled_capacity(scores)
    truth = channel_capacity(P)
    assert found.kind == "estimate"
    assert found.standard_error < 0.02
    assert found.value == pytest.approx(truth.value, abs=4 * found.standard_error)
    assert found.lam_D == pytest.approx(truth.lam_D, abs=0.05)


@pytest.mark.parametrize(
    "mixtures",
    [None, Vertices([[0.6, 0.4, 0.0], [0.4, 0.6, 0.0]]), Vertices([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]), Box(0.2, 0.5)],
)
@pytest.mark.parametrize("scale_D", [None, [0.5, 1.0, 0.125]])
def test_with_every_outcome_drawn_in_its_share_it_is_the_value_of_the_game(mixtures, scale_D):
    """The optimum over allowed mixtures, by brute force over a grid."""
    counts = np.array([[6, 3, 1, 2], [1, 5, 5, 1], [2, 1, 2, 7]])
    P = counts / 12
    scores = [np.log(P.T[np.repeat(np.arange(4), row)]) for row in counts]
    s_D = np.ones(3) if scale_D is None else np.array(scale_D)

    def value(lam_D):
        mu_D = lam_D * s_D / (lam_D @ s_D)
        return float((lam_D * s_D) @ (P * np.log(P / (mu_D @ P))).sum(axis=1))

    grid = np.linspace(0, 1, 101)
    simplex = np.array([[a, b, 1 - a - b] for a in grid for b in grid if a + b <= 1 + 1e-9]).clip(0)
    if isinstance(mixtures, Box):
        allowed = simplex[((simplex >= 0.2 - 1e-9) & (simplex <= 0.5 + 1e-9)).all(axis=1)]
    elif mixtures is None:
        allowed = simplex
    else:
        ends = np.array(mixtures.weights_MD)
        allowed = np.array([a * ends[0] + (1 - a) * ends[1] for a in grid])
    found = sampled_capacity(scores, mixtures=mixtures, scale_D=scale_D, tolerance=1e-9)
    most = max(map(value, allowed))
    assert most - 1e-6 <= found.value <= found.value + found.gap
    assert found.value == pytest.approx(most, abs=1e-4)
    assert value(found.lam_D) == pytest.approx(found.value, abs=1e-9)


def test_other_domains_models_may_rule_a_sample_out():
    found = sampled_capacity([[[-1.0, -np.inf]] * 3, [[-np.inf, -2.0]] * 5])
    assert found.value == pytest.approx(math.log(2))
    assert found.standard_error == pytest.approx(0.0, abs=1e-12)


def test_what_is_refused():
    with pytest.raises(NumericsError, match=r"row 1 of logP_DX sums to 0\.8"):
        channel_capacity([[0.5, 0.5], [0.5, 0.3]])
    with pytest.raises(ConfigError, match="a row and a column"):
        channel_capacity(np.zeros((0, 3)))
    with pytest.raises(ConfigError, match="max_iterations"):
        channel_capacity([[1.0]], max_iterations=0)
    with pytest.raises(DataError, match="no domains"):
        sampled_capacity([])
    with pytest.raises(DataError, match="domain 1 has no samples"):
        sampled_capacity([[[-1.0, -2.0]], np.zeros((0, 2))])
    with pytest.raises(DataError, match="own model"):
        sampled_capacity([[[-np.inf, -2.0]], [[-1.0, -1.0]]])
    with pytest.raises(ConfigError, match="a positive number for each of the 2"):
        sampled_capacity([[[-1.0, -2.0]], [[-1.0, -1.0]]], scale_D=[1.0, 0.0])
    with pytest.raises(ConfigError, match="1 columns"):
        sampled_capacity([[[-1.0]], [[-1.0]]])

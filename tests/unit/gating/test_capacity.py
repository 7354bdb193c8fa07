"""Channel capacity: known channels, brackets, estimates from samples."""

import math

import numpy as np
import pytest
from support.gating import random_problem

from weftlm.gating import Box, channel_capacity, sampled_capacity


@pytest.mark.parametrize(
    ("P", "value", "lam_D"),
    [
        ([[0.5, 0.5]], 0.0, [1.0]),
        (np.kron(np.eye(4), [0.25, 0.75]), math.log(4), [0.25] * 4),  # disjoint domains
        # The binary symmetric channel, and the one that turns 1 into 0 half of the time.
        ([[0.89, 0.11], [0.11, 0.89]], math.log(2) + 0.11 * math.log(0.11) + 0.89 * math.log(0.89), [0.5, 0.5]),
        ([[1.0, 0.0], [0.5, 0.5]], math.log(1 + 0.5 * 0.5), [0.6, 0.4]),
    ],
)
def test_known_channels(P, value, lam_D):
    found = channel_capacity(P)
    assert found.value == pytest.approx(value, abs=1e-8)
    assert found.lam_D == pytest.approx(lam_D, abs=1e-3)
    assert found.standard_error is None


def test_a_repeated_domain_adds_nothing_and_the_bracket_holds_when_cut_short():
    P, _ = random_problem(0)
    whole, cut = channel_capacity(P), channel_capacity(P, max_iterations=3)
    assert channel_capacity(np.vstack([P, P[:1]])).value == pytest.approx(whole.value, abs=1e-7)
    assert cut.iterations == 3
    assert cut.value <= whole.value <= cut.value + cut.gap


def test_samples_estimate_it():
    P, _ = random_problem(1)
    r = np.random.default_rng(0)
    found, truth = sampled_capacity([np.log(P.T[r.choice(8, 20_000, p=row)]) for row in P]), channel_capacity(P)
    assert 0.0 < found.standard_error < 0.02
    assert found.value == pytest.approx(truth.value, abs=4 * found.standard_error)
    assert found.lam_D == pytest.approx(truth.lam_D, abs=0.05)


GRID = np.linspace(0, 1, 101)
SIMPLEX = np.array([[a, b, 1 - a - b] for a in GRID for b in GRID if a + b <= 1 + 1e-9]).clip(0)
BOXED = SIMPLEX[((SIMPLEX >= 0.2 - 1e-9) & (SIMPLEX <= 0.5 + 1e-9)).all(axis=1)]


def between(first, last):
    return np.outer(GRID, first) + np.outer(1 - GRID, last)


@pytest.mark.parametrize(
    ("mixtures", "allowed"),
    [
        (None, SIMPLEX),
        ([[0.6, 0.4, 0.0], [0.4, 0.6, 0.0]], between([0.6, 0.4, 0.0], [0.4, 0.6, 0.0])),
        ([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]], between([0.7, 0.2, 0.1], [0.1, 0.2, 0.7])),
        (Box(0.2, 0.5), BOXED),
    ],
    ids=["all", "two domains", "three domains", "box"],
)
@pytest.mark.parametrize("scale_D", [None, [0.5, 1.0, 0.125]])
def test_with_every_outcome_drawn_in_its_share_it_is_the_value_of_the_game(mixtures, allowed, scale_D):
    """The optimum over allowed mixtures, by brute force over a grid."""
    counts = np.array([[6, 3, 1, 2], [1, 5, 5, 1], [2, 1, 2, 7]])
    P, s_D = counts / 12, np.ones(3) if scale_D is None else np.array(scale_D)

    def value(lam_D):
        mu_D = lam_D * s_D / (lam_D @ s_D)
        return float((lam_D * s_D) @ (P * np.log(P / (mu_D @ P))).sum(axis=1))

    scores = [np.log(P.T[np.repeat(np.arange(4), row)]) for row in counts]
    found, most = sampled_capacity(scores, mixtures=mixtures, scale_D=scale_D, tolerance=1e-9), max(map(value, allowed))
    assert most - 1e-6 <= found.value <= found.value + found.gap
    assert found.value == pytest.approx(most, abs=1e-4)
    assert value(found.lam_D) == pytest.approx(found.value, abs=1e-9)


def test_other_domains_models_may_rule_a_sample_out():
    found = sampled_capacity([[[-1.0, -np.inf]] * 3, [[-np.inf, -2.0]] * 5])
    assert (found.value, found.standard_error) == (pytest.approx(math.log(2)), pytest.approx(0.0, abs=1e-12))

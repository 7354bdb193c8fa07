"""The exact programme: what it returns, and what it refuses."""

import importlib

import numpy as np
import pytest
from support.gating import kl, random_problem

from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.gating import Box, best_constant_gate, exact_robust_gate, mixture_regrets
from weftlm.gating.arrays import cross_entropies
from weftlm.gating.exact import extreme_gate

pytest.importorskip("cvxpy")


def test_offsets_shift_the_value():
    P, Q = random_problem(0)
    plain, lower = (exact_robust_gate(P, Q, offsets=[offset] * 3) for offset in (0.0, 0.5))
    assert plain.value - lower.value == pytest.approx(0.5, abs=1e-6)
    assert plain.value == pytest.approx(cross_entropies(P, plain.pi).max(), abs=1e-9)


def test_perfect_experts_reach_the_capacity_with_a_constant():
    P, _ = random_problem(1)
    exact, constant = exact_robust_gate(P, P), best_constant_gate(P, P)
    assert exact.value == pytest.approx(constant.value, abs=1e-6)
    assert constant.gate[:, 0] == pytest.approx(exact.lam, abs=1e-3)
    assert exact.z_multiplier == pytest.approx(1.0, abs=1e-3)


def test_the_extreme_gate_makes_the_model_and_shares_equally():
    Q = np.array([[0.1, 0.3, 0.2], [0.4, 0.3, 0.2], [0.5, 0.4, 0.6]])
    pi = np.array([0.5, 0.35, Q[:, 2].mean()])
    gate = extreme_gate(pi, Q)
    assert (gate * Q).sum(axis=0) == pytest.approx(pi)
    assert gate.sum(axis=0) == pytest.approx([1.0] * 3)
    assert gate[:, 0] == pytest.approx([0.0, 0.0, 1.0])
    assert gate[0, 1] == pytest.approx(gate[1, 1])


def test_a_point_nobody_produces_needs_no_expert():
    exact = exact_robust_gate([[0.5, 0.5, 0.0]], [[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]])
    assert exact.value == pytest.approx(0.0, abs=1e-6)
    assert exact.gate.sum(axis=0) == pytest.approx([1.0, 1.0, 1.0])


def test_regrets_of_a_mixture():
    P, Q = random_problem(2)
    found = mixture_regrets(P, Q, [0.2, 0.3, 0.5])
    assert found == pytest.approx([kl(p, np.array([0.2, 0.3, 0.5]) @ Q) for p in P])
    assert np.isinf(mixture_regrets([[0.5, 0.5]], [[1.0, 0.0]], [1.0])).all()


P, Q = random_problem(3)


@pytest.mark.parametrize(
    ("p", "q", "options", "error", "match"),
    [
        ([[0.5, 0.5]], [[1.0, 0.0]], {}, DataError, "probability 0 under every one of 1 experts"),
        (P, Q[:, :4] / Q[:, :4].sum(axis=1, keepdims=True), {}, ConfigError, "one support"),
        (P, 1.1 * Q, {}, NumericsError, r"of Q sums to 1\.1"),
        (P * np.nan, Q, {}, NumericsError, "holds NaN"),
        (P[0], Q, {}, ConfigError, "D x X"),
        (P, Q, {"offsets": [0.0]}, ConfigError, "one finite number each"),
        (P, Q, {"offsets": [0.0] * 3, "mixtures": Box(0.2)}, ConfigError, "takes no bounds"),
    ],
)
def test_what_is_refused(p, q, options, error, match):
    with pytest.raises(error, match=match):
        exact_robust_gate(p, q, **options)


def test_without_cvxpy_it_says_what_to_install(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"pip install '\.\[exact\]'"):
        exact_robust_gate([[1.0]], [[1.0]])

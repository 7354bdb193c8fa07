"""The exact programme: what it returns, and what it refuses."""

import importlib

import numpy as np
import pytest
from support.gating import kl, random_problem

from weftlm.errors import ConfigError
from weftlm.gating import Box, exact_robust_gate, mixture_regrets
from weftlm.gating.arrays import cross_entropies
from weftlm.gating.exact import extreme_gate

pytest.importorskip("cvxpy")


def test_offsets_shift_the_value():
    P, Q = random_problem(0)
    plain, lower = (exact_robust_gate(P, Q, offsets=[offset] * 3) for offset in (0.0, 0.5))
    assert plain.value - lower.value == pytest.approx(0.5, abs=1e-6)
    assert plain.value == pytest.approx(cross_entropies(P, plain.pi).max(), abs=1e-9)


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


def test_bounds_are_refused():
    with pytest.raises(ConfigError, match="takes no bounds"):
        exact_robust_gate(*random_problem(3), offsets=[0.0] * 3, mixtures=Box(0.2))


def test_without_cvxpy_it_says_what_to_install(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"pip install '\.\[exact\]'"):
        exact_robust_gate([[1.0]], [[1.0]])

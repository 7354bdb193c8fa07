"""The robust gate on an enumerated support, exactly, by convex programming: the oracle of everything else in the room.

Needs cvxpy, which the extra `exact` brings.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from weftlm.errors import ConfigError, NumericsError, install_hint, reason
from weftlm.gating.arrays import Floats, cross_entropies, entropies, log_support, simplex_vector
from weftlm.gating.problem import make_problem


@dataclass(frozen=True, eq=False)
class ExactResult:
    """A solved programme.

    Attributes:
        value: Worst case over the mixtures, nats per sequence.
        gate: g, E x X; columns sum to 1.
        lam: Worst mixture of domains, D: the programme's duals.
        z_multiplier: Dual of sum_x pi_g(x) = 1.
        pi: Gated model pi_g, X; sums to 1.
    """

    value: float
    gate: Floats
    lam: Floats
    z_multiplier: float
    pi: Floats


def exact_robust_gate(P: Any, Q: Any, *, offsets: Any = None, mixtures: Any = None) -> ExactResult:
    """The gate that is best against the worst mixture, over all gates on a finite support.

        min over g, t of t    s.t.  CE_v(pi_g) - offset_v <= t  for every extreme mixture v
                                    sum_k g(x, k) = 1,  g >= 0,  sum_x pi_g(x) = 1
        pi_g(x) = sum_k g(x, k) q_k(x)          CE_v(pi) = - sum_x p_v(x) log pi(x)

    Cortes, Mohri and Zhong 2026, arXiv:2602.17554. What a gate can make of a point is any pi(x) between the smallest
    and the largest q_k(x), so the programme is solved in pi alone, X numbers instead of E X. Of the gates that make the
    optimal pi, the one that mixes the likeliest and the least likely expert of each point is returned (`extreme_gate`).

    Args:
        P: The domains, D x X, probabilities or their logs.
        Q: The experts, E x X, likewise.
        offsets: As in `make_problem`. None: the entropy of the domain, and of the mixed text of a mixture, so that the
            value is the worst KL(p_v || pi_g).
        mixtures: None for all mixtures of domains, else the extreme mixtures, an array M x D.
    Raises:
        ConfigError: shapes do not fit, mixtures are a `Box`, or cvxpy is not installed.
        DataError: a point some domain produces has probability 0 under every expert.
        NumericsError: rows that are not normalised, or no solution found.
    """
    return _solved(P, Q, offsets, mixtures, constant=False)


def best_constant_gate(P: Any, Q: Any, *, offsets: Any = None, mixtures: Any = None) -> ExactResult:
    """The constant gate (a mixture of the experts) that is best against the worst mixture of domains.

        min over w on the simplex of  max over v of  CE_v(sum_k w_k q_k) - offset_v

    Arguments, result and errors are those of `exact_robust_gate`; `gate` has equal columns, w.
    """
    return _solved(P, Q, offsets, mixtures, constant=True)


def _solved(P: Any, Q: Any, offsets: Any, mixtures: Any, *, constant: bool) -> ExactResult:
    """Minimise the worst case in pi / high (high: the largest q_k), of free pi or of pi = sum_k w_k q_k."""
    try:
        cp = importlib.import_module("cvxpy")
    except ImportError as error:
        raise ConfigError(
            f"exact gates need cvxpy, which cannot be imported ({reason(error)}); {install_hint('exact')}, or use "
            "fit_robust_gate, which needs nothing more"
        ) from error
    asked = make_problem(P, Q, offsets=offsets, mixtures=mixtures)
    adversary = asked.adversary
    if adversary.bounded:
        raise ConfigError("the exact programme takes no bounds over mixtures; give the extreme ones, an array M x D")
    assert asked.support is not None
    p_DX, q_EX = asked.support
    p_MX, offsets_M = adversary.weights_MD @ p_DX, -asked.payoffs(-asked.offsets_D)
    low_X, high_X = q_EX.min(axis=0), q_EX.max(axis=0)
    used_X = high_X > 0
    p_MU, high_U = p_MX[:, used_X], high_X[used_X]
    worst, shares_UE = cp.Variable(), (q_EX[:, used_X] / high_U).T
    bounds: list[Any] = []
    if constant:
        variable = cp.Variable(len(q_EX), nonneg=True)
        ratio, whole = shares_UE @ variable, cp.sum(variable) == 1.0
    else:
        variable = ratio = cp.Variable(len(high_U))
        whole, bounds = high_U @ ratio == 1.0, [ratio <= 1.0, ratio >= low_X[used_X] / high_U]
    # Points no mixture produces have no part in a cross-entropy; log is concave and need not be finite there.
    met_U = p_MU.sum(axis=0) > 0
    each = -(p_MU[:, met_U] @ cp.log(ratio[met_U])) - p_MU @ np.log(high_U) - offsets_M <= worst
    problem = cp.Problem(cp.Minimize(worst), [each, whole, *bounds])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            problem.solve(solver=cp.CLARABEL)
            status = problem.status
        except cp.SolverError as error:
            status = reason(error)
    if status not in ("optimal", "optimal_inaccurate"):
        raise NumericsError(f"the exact programme was not solved ({status}); are there probabilities near 0?")
    found = np.asarray(variable.value, dtype=np.float64)
    if constant:
        w_E = np.maximum(found, 0.0) / np.maximum(found, 0.0).sum()
        pi_X, gate = w_E @ q_EX, np.repeat(w_E[:, None], len(high_X), axis=1)
    else:
        pi_X = np.zeros(len(high_X))
        pi_X[used_X] = np.clip(found * high_U, low_X[used_X], high_U)
        gate = extreme_gate(pi_X, q_EX)
    duals_M = np.maximum(np.atleast_1d(np.asarray(each.dual_value, dtype=np.float64)), 0.0)
    return ExactResult(
        value=float((cross_entropies(p_MX, pi_X) - offsets_M).max()),
        gate=gate,
        lam=adversary.lam(duals_M / duals_M.sum()),
        z_multiplier=float(np.asarray(whole.dual_value)),
        pi=pi_X,
    )


def mixture_regrets(P: Any, Q: Any, weights_E: Any) -> Floats:
    """KL(p_d || sum_k w_k q_k) of every domain, nats; no solver needed. Infinite where the mixture misses a point.

    Raises:
        ConfigError: shapes do not fit, or the weights are no probability vector.
        NumericsError: rows that are not normalised.
    """
    p_DX, q_EX = (logs.exp().numpy() for logs in log_support(P, Q))
    return cross_entropies(p_DX, simplex_vector(weights_E, "weights_E", len(q_EX)) @ q_EX) - entropies(p_DX)


def extreme_gate(pi_X: Floats, q_EX: Floats) -> Floats:
    """The gate that makes a model out of the experts of largest and smallest probability at each point, E x X.

        g(x, .) = a(x) at the largest q_k(x), 1 - a(x) at the smallest, shared equally among equal ones
        a(x) = (pi(x) - min_k q_k(x)) / (max_k q_k(x) - min_k q_k(x))

    The model pi must be between the experts' smallest and largest probability at every point.
    """
    low_X, high_X = q_EX.min(axis=0), q_EX.max(axis=0)
    share_X = np.clip((pi_X - low_X) / np.where(high_X > low_X, high_X - low_X, 1.0), 0.0, 1.0)
    top_EX, bottom_EX = (np.equal(q_EX, end_X) for end_X in (high_X, low_X))
    gate: Floats = share_X * top_EX / top_EX.sum(axis=0) + (1.0 - share_X) * bottom_EX / bottom_EX.sum(axis=0)
    return gate

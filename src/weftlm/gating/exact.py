"""The robust gate on an enumerated support, exactly, by convex programming: the oracle of everything else in the room.

Needs cvxpy, which the extra `exact` brings.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from weftlm.errors import ConfigError, NumericsError, install_hint, reason
from weftlm.gating.arrays import Floats, log_distributions, simplex_vector, to_tensor
from weftlm.gating.features import refuse_impossible
from weftlm.gating.mixtures import MixtureSet, Player, box_vertices, player


@dataclass(frozen=True, eq=False)
class ExactResult:
    """A solved programme.

    Attributes:
        value: worst case over the mixtures, nats per sequence.
        gate: g, E x X; columns sum to 1.
        lam: the worst mixture of domains, D: the programme's duals.
        z_multiplier: dual of sum_x pi_g(x) = 1; None for a constant gate, which needs no such constraint.
        status: the solver's word: "optimal" or "optimal_inaccurate".
        pi: the gated model pi_g, X; sums to 1.
    """

    value: float
    gate: Floats
    lam: Floats
    z_multiplier: float | None
    status: str
    pi: Floats


def exact_robust_gate(P: Any, Q: Any, *, offsets: Any = None, mixtures: MixtureSet | Any | None = None) -> ExactResult:
    """The gate that is best against the worst mixture, over all gates on a finite support.

        min over g, t of t    s.t.  CE_v(pi_g) - offset_v <= t  for every extreme mixture v
                                    sum_k g(x, k) = 1,  g >= 0,  sum_x pi_g(x) = 1
        pi_g(x) = sum_k g(x, k) q_k(x)          CE_v(pi) = - sum_x p_v(x) log pi(x)

    Cortes, Mohri and Zhong 2026, arXiv:2602.17554. What a gate can make of a point is any pi(x) between the smallest
    and the largest q_k(x), so the programme is solved in pi alone, X numbers instead of E X. Of the gates that make the
    optimal pi the one of largest entropy is returned, g(x, k) prop. to exp(s(x) q_k(x)): it is unique, and permuting
    experts permutes it.

    Args:
        P: the domains, D x X, probabilities or their logs.
        Q: the experts, E x X, likewise.
        offsets: what to take off each domain's cross-entropy, D numbers in nats; mixtures then take off the mixture of
            offsets unless they bring their own. None: the entropy of the domain, and of the mixed text of a mixture, so
            that the value is the worst KL(p_v || pi_g).
        mixtures: None for all mixtures of domains, else `Vertices`, an array M x D of extreme mixtures, or a `Box`.
    Raises:
        ConfigError: shapes do not fit, or cvxpy is not installed.
        DataError: a point some domain produces has probability 0 under every expert.
        NumericsError: rows that are not normalised, or no solution found.
    """
    cp = _cvxpy()
    p_DX, q_EX = _distributions(P, Q)
    p_MX, offsets_M, opponent = _constraints(p_DX, offsets, mixtures)
    high_X, low_X = q_EX.max(axis=0), q_EX.min(axis=0)
    used_X = high_X > 0
    ratio = cp.Variable(int(used_X.sum()))
    worst = cp.Variable()
    p_MU, high_U = p_MX[:, used_X], high_X[used_X]
    fixed_M = -(p_MU @ np.log(high_U)) - offsets_M
    each = -(p_MU @ cp.log(ratio)) + fixed_M <= worst
    whole = high_U @ ratio == 1.0
    problem = cp.Problem(cp.Minimize(worst), [each, whole, ratio <= 1.0, ratio >= low_X[used_X] / high_U])
    status = _solve(cp, problem)
    pi_X = np.zeros(len(high_X))
    pi_X[used_X] = np.clip(np.asarray(ratio.value) * high_U, low_X[used_X], high_U)
    nu_M = _duals(each)
    return ExactResult(
        value=_worst(p_MX, pi_X, offsets_M),
        gate=entropic_gate(pi_X, q_EX),
        lam=opponent.lam(nu_M),
        z_multiplier=float(np.asarray(whole.dual_value)),
        status=status,
        pi=pi_X,
    )


def best_constant_gate(P: Any, Q: Any, *, offsets: Any = None, mixtures: MixtureSet | Any | None = None) -> ExactResult:
    """The constant gate (a mixture of the experts) that is best against the worst mixture of domains.

        min over w on the simplex of  max over v of  CE_v(sum_k w_k q_k) - offset_v

    Arguments, result and errors are those of `exact_robust_gate`; `gate` has equal columns, w.
    """
    cp = _cvxpy()
    p_DX, q_EX = _distributions(P, Q)
    p_MX, offsets_M, opponent = _constraints(p_DX, offsets, mixtures)
    high_X = q_EX.max(axis=0)
    used_X = p_MX.sum(axis=0) > 0
    weights = cp.Variable(len(q_EX), nonneg=True)
    worst = cp.Variable()
    p_MU, high_U = p_MX[:, used_X], high_X[used_X]
    fixed_M = -(p_MU @ np.log(high_U)) - offsets_M
    each = -(p_MU @ cp.log((q_EX[:, used_X] / high_U).T @ weights)) + fixed_M <= worst
    status = _solve(cp, cp.Problem(cp.Minimize(worst), [each, cp.sum(weights) == 1.0]))
    w_E = np.maximum(np.asarray(weights.value, dtype=np.float64), 0.0)
    w_E /= w_E.sum()
    pi_X = w_E @ q_EX
    return ExactResult(
        value=_worst(p_MX, pi_X, offsets_M),
        gate=np.repeat(w_E[:, None], len(pi_X), axis=1),
        lam=opponent.lam(_duals(each)),
        z_multiplier=None,
        status=status,
        pi=pi_X,
    )


def mixture_regrets(P: Any, Q: Any, weights_E: Any) -> Floats:
    """KL(p_d || sum_k w_k q_k) of every domain, nats; no solver needed. Infinite where the mixture misses a point.

    Raises:
        ConfigError: shapes do not fit, or the weights are no probability vector.
        NumericsError: rows that are not normalised.
    """
    p_DX, q_EX = _distributions(P, Q, impossible=True)
    pi_X = simplex_vector(weights_E, "weights_E", len(q_EX)) @ q_EX
    return cross_entropies(p_DX, pi_X) - entropies(p_DX)


def entropies(p_DX: Floats) -> Floats:
    """H(p_d), nats."""
    return cross_entropies(p_DX, p_DX)


def cross_entropies(p_DX: Floats, m: Floats) -> Floats:
    """- sum_x p_d(x) log m(x), nats; m is one distribution or one per domain."""
    logs = np.log(m, out=np.full_like(m, -np.inf), where=m > 0)
    terms: Floats = -np.where(p_DX > 0, p_DX * np.where(p_DX > 0, logs, 0.0), 0.0).sum(axis=1)
    return terms


def entropic_gate(pi_X: Floats, q_EX: Floats) -> Floats:
    """The gate of largest entropy that makes a model out of the experts, E x X.

        g(x, k) prop. to exp(s(x) q_k(x) / spread(x))       with s(x) such that  sum_k g(x, k) q_k(x) = pi(x)

    Args:
        pi_X: between the experts' smallest and largest probability at every point.
        q_EX: the experts.
    """
    low_X, high_X = q_EX.min(axis=0), q_EX.max(axis=0)
    spread_X = np.where(high_X > low_X, high_X - low_X, 1.0)
    place_EX = (q_EX - low_X) / spread_X
    target_X = np.clip((pi_X - low_X) / spread_X, 0.0, 1.0)
    left, right = np.full(len(pi_X), -1e6), np.full(len(pi_X), 1e6)
    for _ in range(100):
        middle = 0.5 * (left + right)
        above = (_tilted(middle, place_EX) * place_EX).sum(axis=0) > target_X
        left, right = np.where(above, left, middle), np.where(above, middle, right)
    gate = _tilted(0.5 * (left + right), place_EX)
    flat = high_X <= low_X
    gate[:, flat] = 1.0 / len(q_EX)
    return gate


def _tilted(slope_X: Floats, place_EX: Floats) -> Floats:
    exponents = slope_X * place_EX
    tilted = np.exp(exponents - exponents.max(axis=0))
    weights: Floats = tilted / tilted.sum(axis=0)
    return weights


def _distributions(P: Any, Q: Any, *, impossible: bool = False) -> tuple[Floats, Floats]:
    """P and Q as probabilities over one support."""
    logp_DX, logq_EX = log_distributions(P, "P", "DX"), log_distributions(Q, "Q", "EX")
    if logp_DX.shape[1] != logq_EX.shape[1]:
        raise ConfigError(
            f"P has {logp_DX.shape[1]} points and Q {logq_EX.shape[1]}; domains and experts need one support"
        )
    if not impossible:
        seen_X = (logp_DX > -torch.inf).any(dim=0)
        refuse_impossible(logq_EX[:, seen_X].T, "the points the domains produce")
    return logp_DX.exp().numpy(), logq_EX.exp().numpy()


def _constraints(p_DX: Floats, offsets: Any, mixtures: Any) -> tuple[Floats, Floats, Player]:
    """The extreme mixtures as domains: their texts p_MX, their offsets, and who mixes them."""
    opponent = player(mixtures, len(p_DX))
    if opponent.bounded:
        opponent = player(box_vertices(opponent), len(p_DX))
    p_MX = opponent.weights_MD @ p_DX
    if opponent.offsets_M is not None:
        return p_MX, opponent.offsets_M, opponent
    if offsets is None:
        return p_MX, entropies(p_MX), opponent
    offsets_D = to_tensor(offsets, "offsets", "D").double().numpy()
    if len(offsets_D) != len(p_DX) or not np.isfinite(offsets_D).all():
        raise ConfigError(f"offsets {offsets_D.tolist()} for {len(p_DX)} domains; one finite number each, in nats")
    return p_MX, opponent.weights_MD @ offsets_D, opponent


def _worst(p_MX: Floats, pi_X: Floats, offsets_M: Floats) -> float:
    return float((cross_entropies(p_MX, pi_X) - offsets_M).max())


def _duals(each: Any) -> Floats:
    duals_M = np.maximum(np.atleast_1d(np.asarray(each.dual_value, dtype=np.float64)), 0.0)
    nu_M: Floats = duals_M / duals_M.sum()
    return nu_M


def _solve(cp: Any, problem: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            problem.solve(solver=cp.CLARABEL)
        except cp.SolverError as error:
            raise NumericsError(
                f"the exact programme was not solved: {reason(error)}; are there probabilities near 0?"
            ) from error
    if problem.status not in ("optimal", "optimal_inaccurate"):
        raise NumericsError(f"the exact programme ended {problem.status!r}; are there probabilities near 0?")
    return str(problem.status)


def _cvxpy() -> Any:
    try:
        return importlib.import_module("cvxpy")
    except ImportError as error:
        raise ConfigError(
            f"exact gates need cvxpy, which cannot be imported ({reason(error)}); {install_hint('exact')}, or use "
            "fit_robust_gate, which needs nothing more"
        ) from error

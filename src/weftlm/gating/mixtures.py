"""Which mixtures of domains the gate must be good for: all, the hull of some, or those within bounds.

Inside, every set is a player on a simplex, perhaps with bounds: nu over M extreme mixtures, lambda = V^T nu. Where all
mixtures are allowed, or bounds are given, V is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from weftlm.errors import ConfigError
from weftlm.gating.arrays import Floats, simplex_vector, to_tensor


@dataclass(frozen=True, eq=False)
class Box:
    """All mixtures with lower_D <= lambda <= upper_D.

    Attributes:
        lower_D: Smallest weight of each domain, a number for all alike, or None for 0.
        upper_D: Largest weight of each domain, a number for all alike, or None for 1.
    """

    lower_D: Any = None
    upper_D: Any = None


@dataclass(frozen=True, eq=False)
class Player:
    """The adversary: nu in {lower <= nu <= upper, sum nu = 1} over M extreme mixtures, lambda_D = V^T nu.

    Attributes:
        weights_MD: V.
        lower_M: Lower bounds; 0 where there is none.
        upper_M: Upper bounds; 1 where there is none.
    """

    weights_MD: Floats
    lower_M: Floats
    upper_M: Floats

    @property
    def bounded(self) -> bool:
        """Whether there are bounds besides the simplex."""
        return bool((self.lower_M > 0).any() or (self.upper_M < 1).any())

    @property
    def restricted(self) -> bool:
        """Whether some mixture of the domains is not allowed."""
        return self.bounded or not bool((np.max(self.weights_MD, axis=0) == 1.0).all())

    def lam(self, nu_M: Floats) -> Floats:
        """lambda_D of a strategy."""
        return nu_M @ self.weights_MD

    def start(self) -> Floats:
        """log nu of the uniform strategy, projected into the bounds."""
        uniform_M = np.full(len(self.weights_MD), -np.log(len(self.weights_MD)))
        return self.project(uniform_M)

    def project(self, log_nu_M: Floats) -> Floats:
        """log of the Kullback-Leibler projection onto the player's set (`kl_projection`)."""
        if not self.bounded:
            top = log_nu_M.max()
            normalised: Floats = log_nu_M - top - np.log(np.exp(log_nu_M - top).sum())
            return normalised
        return kl_projection(log_nu_M, self.lower_M, self.upper_M)

    def step(self, log_nu_M: Floats, exponents_M: Floats) -> Floats:
        """One step of exponentiated gradient: nu exp(x), projected.

        Weights are kept above exp(-30), from where a mixture that turns bad comes back quickly.
        """
        return self.project(np.maximum(self.project(log_nu_M + exponents_M), -30.0))

    def best(self, payoffs_M: Floats) -> tuple[float, Floats]:
        """max over nu of nu . payoffs, and a maximiser: lower bounds first, the rest to the best payoffs in turn."""
        nu_M = self.lower_M.copy()
        left = 1.0 - float(nu_M.sum())
        for m in np.argsort(-payoffs_M, kind="stable"):
            more = min(left, float(self.upper_M[m] - nu_M[m]))
            nu_M[m] += more
            left -= more
            if left <= 0.0:
                break
        return float(nu_M @ payoffs_M), nu_M


def player(mixtures: Box | Player | Any | None, domains: int) -> Player:
    """The player over all mixtures of D domains (None), those within bounds, or the convex hull of an array M x D.

    Raises:
        ConfigError: shapes do not fit, a row is no mixture, or no mixture is within the bounds.
    """
    if mixtures is None:
        return Player(np.eye(domains), np.zeros(domains), np.ones(domains))
    if isinstance(mixtures, Player):
        return mixtures
    if isinstance(mixtures, Box):
        lower, upper = _bounds(mixtures, domains)
        return Player(np.eye(domains), lower, upper)
    weights = to_tensor(mixtures, "mixtures", "MD").numpy()
    if len(weights) == 0:
        raise ConfigError("mixtures hold no mixture; give one row per extreme mixture, or None for all mixtures")
    rows = np.stack([simplex_vector(row, f"mixtures[{m}]", domains) for m, row in enumerate(weights)])
    return Player(rows, np.zeros(len(rows)), np.ones(len(rows)))


def _bounds(box: Box, domains: int) -> tuple[Floats, Floats]:
    sides = []
    for name, value, default in (("lower_D", box.lower_D, 0.0), ("upper_D", box.upper_D, 1.0)):
        given = np.asarray(default if value is None else value, dtype=np.float64)
        side = np.full(domains, float(given)) if given.ndim == 0 else given
        if side.shape != (domains,) or not bool(((side >= 0) & (side <= 1)).all()):
            raise ConfigError(f"mixture bounds: {name} is {value!r}; it needs {domains} numbers from 0 to 1, or one")
        sides.append(side)
    lower, upper = sides
    if bool((lower > upper).any()) or float(lower.sum()) > 1.0 + 1e-9 or float(upper.sum()) < 1.0 - 1e-9:
        raise ConfigError(
            f"no mixture is within the bounds: lower {lower.tolist()} (sum {lower.sum():.6g}), upper "
            f"{upper.tolist()} (sum {upper.sum():.6g}); need lower <= upper, and sums at most and at least 1"
        )
    return lower, upper


def kl_projection(log_y_D: Floats, lower_D: Floats, upper_D: Floats) -> Floats:
    """log of the point of a bounded simplex nearest to y in KL(. || y).

        argmin KL(z || y)  over  lower <= z <= upper, sum z = 1      =      clip(c y, lower, upper)

    where c makes the sum 1, found by bisection, since the sum grows with c. The same fills a model up to given bounds
    (`dual_value`).

    Args:
        log_y_D: Logs of numbers, not necessarily normalised.
        lower_D: Lower bounds, >= 0, summing to at most 1.
        upper_D: Upper bounds, summing to at least 1.
    """
    log_y_D = log_y_D - log_y_D.max()
    with np.errstate(divide="ignore"):
        log_lower, log_upper = np.log(lower_D), np.log(upper_D)
    left, right = -800.0, 800.0
    for _ in range(100):
        middle = 0.5 * (left + right)
        above = np.exp(np.clip(middle + log_y_D, log_lower, log_upper)).sum() > 1.0
        left, right = (left, middle) if above else (middle, right)
    projected: Floats = np.clip(0.5 * (left + right) + log_y_D, log_lower, log_upper)
    return projected

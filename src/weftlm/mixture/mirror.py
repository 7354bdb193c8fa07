"""What the policies share that move by mirror steps on the simplex, on a value measured for every group.

    m_i <- m_i exp(x_i) / sum_j m_j exp(x_j),      x_i = eta s_i,      then m <- (1 - c) m + c / G           c = floor

s_i is the value measured last for group i: a domain, or a basis distribution over the domains. A group without a
measurement keeps its last value; one never measured keeps its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from weftlm.errors import NumericsError
from weftlm.mixture.config import Initial, MirrorPolicyConfig
from weftlm.mixture.importance import importance_weights
from weftlm.mixture.policy import CONSTANT, MixturePolicy, MixtureSetting, Report, entropy, with_floor
from weftlm.mixture.proportional import proportional_weights
from weftlm.mixture.signals import keep_last, max_abs
from weftlm.mixture.uniform import uniform_weights


@dataclass(frozen=True)
class MirrorState:
    """What such a policy knows.

    Attributes:
        mirror_G: m, weights after the last mirror step.
        smooth_G: those weights smoothed over the updates, as the policy's `smoothed` does.
        values_G: s, each group's last value; NaN until it was first measured.
        max_exponent: max_i |x_i| of the last update.
        updates: reports that moved the weights.
        skipped: reports that told nothing and changed nothing.
        groups: names, for messages.
    """

    mirror_G: Tensor
    smooth_G: Tensor
    values_G: Tensor
    max_exponent: float
    updates: int
    skipped: int
    groups: tuple[str, ...] = field(metadata=CONSTANT)

    @classmethod
    def at(cls, start_G: Tensor, groups: tuple[str, ...], **more: Any) -> Self:
        """The state before the first report; `more`: the fields of a subclass."""
        return cls(start_G, start_G, torch.full_like(start_G, torch.nan), 0.0, 0, 0, groups, **more)


C = TypeVar("C", bound=MirrorPolicyConfig)
S = TypeVar("S", bound=MirrorState)


class MirrorPolicy(MixturePolicy[C, S]):
    """Base of these policies. A subclass gives `measured`, the other methods where it differs, and its `State`."""

    State: ClassVar[type[MirrorState]] = MirrorState
    floor: ClassVar[str] = "floor"
    """Key of c."""

    @property
    def share(self) -> float:
        """c, the share of the uniform distribution in every step."""
        return float(getattr(self.config, self.floor))

    def measured(self, state: S, report: Report) -> Tensor | None:
        """s_G of a report, NaN for a group without a measurement; None where the report tells nothing.

        Raises:
            ConfigError, NumericsError: as `MixturePolicy.update`.
        """
        raise NotImplementedError

    def exponents(self, state: S, values_G: Tensor) -> Tensor:
        """x_G of the values."""
        return self.config.eta * values_G

    def mirror_step(self, state: S, exponents_G: Tensor) -> Tensor:
        """m_G after the step, before the floor."""
        return exponentiated_gradient(state.mirror_G, exponents_G)

    def smoothed(self, state: S, mirror_G: Tensor) -> Tensor:
        """What becomes of `smooth_G`: the mean of the weights after each update so far."""
        if not state.updates:
            return mirror_G
        return state.smooth_G + (mirror_G - state.smooth_G) / (state.updates + 1)

    def init(self, setting: MixtureSetting) -> S:
        config = self.config
        start_D = with_floor(initial_weights(config.initial, setting, config.policy), self.share)
        return self.State.at(start_D, setting.domains)  # type: ignore[return-value]

    def weights(self, state: S) -> Tensor:
        return state.mirror_G

    def update(self, state: S, report: Report) -> S:
        new_G = self.measured(state, report)
        if new_G is None:
            return replace(state, skipped=state.skipped + 1)
        values_G = keep_last(state.values_G, new_G)
        exponents_G = self.exponents(state, values_G)
        mirror_G = with_floor(self.mirror_step(state, exponents_G), self.share)
        return replace(
            state,
            mirror_G=mirror_G,
            smooth_G=self.smoothed(state, mirror_G),
            values_G=values_G,
            max_exponent=max_abs(exponents_G),
            updates=state.updates + 1,
        )

    def diagnostics(self, state: S) -> Mapping[str, float | list[float]]:
        return {
            "max_exponent": state.max_exponent,
            "entropy_nats": entropy(self.weights(state)),
            "updates": float(state.updates),
            "skipped": float(state.skipped),
        }


def exponentiated_gradient(weights_G: Tensor, exponents_G: Tensor) -> Tensor:
    """Mirror step on the simplex, computed in log space.

        w'_i = w_i exp(x_i) / sum_j w_j exp(x_j)

    A NaN exponent means nothing is known of that entry: its weight stays exactly as it was, and the others share the
    rest of the mass by the rule above.

    Args:
        weights_G: float64, non-negative, sums to 1.
        exponents_G: float64.

    Returns:
        float64, sums to 1; entries at exactly 0 stay 0.

    Raises:
        NumericsError: an exponent is infinite.
    """
    exponents_G = exponents_G.to(torch.float64)
    if torch.isinf(exponents_G).any():
        raise NumericsError(
            f"mirror step exponents {exponents_G.tolist()} hold an infinity; lower eta or use normalize: scale"
        )
    known_G = ~torch.isnan(exponents_G) & (weights_G > 0)
    if not known_G.any():
        return weights_G
    known = weights_G[known_G]
    moved_G = weights_G.clone()
    moved_G[known_G] = torch.softmax(torch.log(known) + exponents_G[known_G], dim=0) * known.sum()
    return moved_G


def initial_weights(initial: Initial, setting: MixtureSetting, policy: str) -> Tensor:
    """alpha_D before the first update, float64.

    Args:
        initial: the static policy whose weights are taken (with its default options).
        setting: what is known of the domains.
        policy: who asks, for messages.

    Raises:
        ConfigError: `importance` without the target's histogram, `proportional` without token counts.
    """
    if initial == "importance":
        return importance_weights(setting, policy)
    if initial == "proportional":
        return proportional_weights(setting)
    return uniform_weights(len(setting.domains))


def nearest_mixture(target_D: Tensor, basis_ND: Tensor, *, steps: int = 1000) -> Tensor:
    """Weights of basis distributions whose mixture is nearest to a distribution.

        w = argmin KL(h || sum_n w_n p_n) = argmax sum_d h_d log sum_n w_n p_nd

    by expectation maximisation, which climbs to the (concave) optimum from w uniform:

        w_n <- w_n sum_d h_d p_nd / (sum_m w_m p_md)

    Args:
        target_D: h, sums to 1. Domains that no basis distribution reaches are left out.
        basis_ND: p, rows sum to 1.
        steps: Number of steps of expectation maximisation.
    Returns:
        w over N, float64, sums to 1; uniform where no basis distribution reaches any domain of h.
    """
    reached_D = basis_ND.sum(dim=0) > 0
    h_D = torch.where(reached_D, target_D, 0.0)
    weights_N = uniform_weights(len(basis_ND))
    if not h_D.sum() > 0:
        return weights_N
    h_D = h_D / h_D.sum()
    for _ in range(steps):
        mixed_D = (weights_N @ basis_ND).clamp_min(torch.finfo(torch.float64).tiny)
        weights_N = weights_N * (basis_ND @ (h_D / mixed_D))
    return weights_N / weights_N.sum()

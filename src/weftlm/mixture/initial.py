"""Where a policy that moves starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from weftlm.mixture.config import Initial
from weftlm.mixture.importance import importance_weights
from weftlm.mixture.policy import MixtureSetting
from weftlm.mixture.proportional import proportional_weights
from weftlm.mixture.uniform import uniform_weights


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

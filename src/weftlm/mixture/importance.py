"""Domains as often as the target's documents fall into them: importance sampling by embedding."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from weftlm.errors import ConfigError
from weftlm.mixture.config import ImportanceConfig, PolicyConfig, policies
from weftlm.mixture.policy import ConstantPolicy, ConstantState, MixtureSetting, missing_signal, with_floor


def importance_weights(setting: MixtureSetting, policy: str = "importance") -> Tensor:
    """The target's histogram over the domains, checked; float64.

    Args:
        setting: with `target_histogram_D`.
        policy: who asks, for the message.

    Raises:
        ConfigError: no histogram, or one that is not a distribution over the domains.
    """
    histogram_D = setting.target_histogram_D
    if histogram_D is None:
        raise missing_signal(policy, "target_histogram")
    histogram_D = histogram_D.to(torch.float64)
    total = float(histogram_D.sum())
    if histogram_D.shape != (len(setting.domains),) or not bool((histogram_D >= 0).all()) or abs(total - 1.0) > 1e-6:
        raise ConfigError(
            f"the target's histogram {histogram_D.tolist()} must hold {len(setting.domains)} shares, none negative, "
            f"that sum to 1; they sum to {total:.6g}"
        )
    return histogram_D / total


@policies.register(
    "importance",
    does="follows the target's histogram over the domains, fixed before training",
    costs="one embedding of the documents",
    paper="arXiv:2410.03735",
)
class ImportancePolicy(ConstantPolicy[ImportanceConfig]):
    """Draw each domain as often as the target's documents lie nearest to it.

        h_i     = | { x in D_spe : the nearest centroid of x is i } | / |D_spe|
        alpha_i = (1 - s) h_i + s / D                                           s = smoothing

    Static. It knows nothing of how many tokens a domain has: a narrow pocket near the target is repeated until it is
    overfitted, and with few target documents most of the histogram is empty.

    Paper: clustered importance sampling, Grangier et al., arXiv 2410.03735; the baseline of arXiv 2410.02498.
    """

    Config: ClassVar[type[PolicyConfig]] = ImportanceConfig

    def init(self, setting: MixtureSetting) -> ConstantState:
        return ConstantState(with_floor(importance_weights(setting), self.config.smoothing))

"""Domains in proportion to their size, flattened or sharpened by an exponent."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from weftlm.errors import ConfigError
from weftlm.mixture.config import PolicyConfig, ProportionalConfig, policies
from weftlm.mixture.policy import ConstantPolicy, ConstantState, MixtureSetting


def proportional_weights(setting: MixtureSetting, temperature: float = 1.0) -> Tensor:
    """alpha_i = n_i^temperature / sum_j n_j^temperature over training tokens n_i, computed in log space; float64.

    Raises:
        ConfigError: a token count is negative or not finite, or all are 0.
    """
    tokens_D = setting.tokens_D.to(torch.float64)
    if not bool(torch.isfinite(tokens_D).all()) or bool((tokens_D < 0).any()) or not bool((tokens_D > 0).any()):
        counts = dict(zip(setting.domains, tokens_D.tolist(), strict=True))
        raise ConfigError(f"tokens per domain are {counts}; they must be finite, not negative, and not all 0")
    filled_D = tokens_D > 0
    alpha_D = torch.zeros_like(tokens_D)
    alpha_D[filled_D] = torch.softmax(temperature * torch.log(tokens_D[filled_D]), dim=0)
    return alpha_D


@policies.register(
    "proportional",
    does="follows the domains' sizes, by a power of them",
    costs="nothing",
    paper="arXiv:1901.07291",
)
class ProportionalPolicy(ConstantPolicy[ProportionalConfig]):
    """Draw domains in proportion to a power of their training tokens.

        alpha_i = n_i^temperature / sum_j n_j^temperature

    `temperature` 1 is one pass over everything shuffled together; below 1 small domains gain. A domain without tokens
    gets 0.

    Paper: exponent smoothing of language sizes as in Lample and Conneau, arXiv 1901.07291 (exponent 0.5 there); the
    exponent 1 is plain practice.
    """

    Config: ClassVar[type[PolicyConfig]] = ProportionalConfig

    def init(self, setting: MixtureSetting) -> ConstantState:
        return ConstantState(proportional_weights(setting, self.config.temperature))

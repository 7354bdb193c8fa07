"""Every domain equally often: the baseline without any knowledge."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from weftlm.mixture.config import PolicyConfig, UniformConfig, policies
from weftlm.mixture.policy import ConstantPolicy, ConstantState, MixtureSetting


def uniform_weights(groups: int) -> Tensor:
    """1/G for each of G groups, float64."""
    return torch.full((groups,), 1.0 / groups, dtype=torch.float64)


@policies.register(
    "uniform",
    does="gives every domain the same weight",
    costs="nothing",
)
class UniformPolicy(ConstantPolicy[UniformConfig]):
    """Draw every domain equally often, whatever its size.

        alpha_i = 1 / D

    Paper: none, the common baseline. Small domains are repeated most.
    """

    Config: ClassVar[type[PolicyConfig]] = UniformConfig

    def init(self, setting: MixtureSetting) -> ConstantState:
        return ConstantState(uniform_weights(len(setting.domains)))

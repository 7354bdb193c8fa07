"""Weights written down by hand in the recipe."""

from __future__ import annotations

from typing import ClassVar

import torch

from weftlm.errors import ConfigError, did_you_mean
from weftlm.mixture.config import PolicyConfig, StaticConfig, policies
from weftlm.mixture.policy import ConstantPolicy, ConstantState, MixtureSetting

TOLERANCE = 1e-6
"""How far from 1 written weights may sum: rounding of decimals, nothing more."""


@policies.register(
    "static",
    does="keeps the weights you write",
    costs="nothing",
)
class StaticPolicy(ConstantPolicy[StaticConfig]):
    """Draw by weights given in the recipe.

        alpha_i = weights[i]

    Names are checked against the domains, and nothing is normalised beyond the last 1e-6 of rounding: weights that do
    not sum to 1 are a mistake somewhere.

    Paper: none.
    """

    Config: ClassVar[type[PolicyConfig]] = StaticConfig

    def init(self, setting: MixtureSetting) -> ConstantState:
        """Check the weights against the domains.

        Raises:
            ConfigError: an unknown or missing domain, or a sum that is not 1.
        """
        written = self.config.weights
        unknown = [name for name in written if name not in setting.domains]
        missing = [name for name in setting.domains if name not in written]
        if unknown:
            hints = "; ".join(
                f"{name!r} is no domain{did_you_mean(name, missing or setting.domains)}" for name in unknown
            )
            raise ConfigError(f"mixture.weights: {hints}")
        if missing:
            raise ConfigError(
                f"mixture.weights names {len(written)} of {len(setting.domains)} domains; missing: "
                f"{', '.join(missing)} (write 0 to leave a domain out)"
            )
        weights_D = torch.tensor([written[name] for name in setting.domains], dtype=torch.float64)
        total = float(weights_D.sum())
        if abs(total - 1.0) > TOLERANCE:
            raise ConfigError(
                f"mixture.weights sum to {total:.6g} over {len(setting.domains)} domains; must be 1 ± {TOLERANCE:g}"
            )
        return ConstantState(weights_D / total)

"""Where a policy that moves starts from."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from weft.mixture.importance import importance_weights
from weft.mixture.policy import MixtureSetting, Signal
from weft.mixture.proportional import proportional_weights
from weft.mixture.uniform import uniform_weights

Initial = Literal["uniform", "importance", "proportional"]


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


def initial_needs(initial: Initial) -> frozenset[Signal]:
    """The signals `initial_weights` reads."""
    return frozenset({"target_histogram"}) if initial == "importance" else frozenset()

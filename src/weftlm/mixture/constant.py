"""What the policies that never move share: a state of weights, and an update that changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from weftlm.mixture.policy import C, Policy, Report, entropy


@dataclass(frozen=True)
class ConstantState:
    """alpha_D, float64, sums to 1."""

    weights_D: Tensor


class ConstantPolicy(Policy[C]):
    """Base of the policies whose weights are decided in `init`."""

    def weights(self, state: ConstantState) -> Tensor:
        return state.weights_D

    def update(self, state: ConstantState, report: Report) -> ConstantState:
        return state

    def diagnostics(self, state: ConstantState) -> Mapping[str, float | list[float]]:
        return {"entropy_nats": entropy(state.weights_D)}

"""Weight in proportion to how far each domain's loss has fallen since the last update."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from weftlm.mixture.config import PolicyConfig, Signal, policies
from weftlm.mixture.policy import MixturePolicy, MixtureSetting, Report, entropy, with_floor
from weftlm.mixture.signals import keep_last, read_losses
from weftlm.mixture.uniform import uniform_weights


class ProgressShareConfig(PolicyConfig):
    """Configuration of `progress_share`."""

    policy: Literal["progress_share"] = Field(default="progress_share", description="Name of this policy.")
    floor: float = Field(default=0.1, gt=0.0, le=1.0, description="c, the share of the uniform distribution.")


@dataclass(frozen=True)
class ProgressShareState:
    """The weights and each domain's last loss (nats per token; NaN until it was drawn)."""

    weights_D: Tensor
    losses_D: Tensor
    domains: tuple[str, ...] = dataclasses.field(metadata={"constant": True})


@policies.register(
    "progress_share",
    does="gives weight to the domains whose loss still falls",
    costs="nothing",
)
class ProgressSharePolicy(MixturePolicy[ProgressShareConfig, ProgressShareState]):
    """Draw the domains whose loss falls.

    p_i     = max(previous loss_i - loss_i, 0)
    alpha_i = (1 - c) p_i / sum_j p_j + c / D
    """

    Config: ClassVar[type[PolicyConfig]] = ProgressShareConfig

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"losses"})

    def init(self, setting: MixtureSetting) -> ProgressShareState:
        start_D = uniform_weights(len(setting.domains))
        return ProgressShareState(start_D, torch.full_like(start_D, torch.nan), setting.domains)

    def weights(self, state: ProgressShareState) -> Tensor:
        return state.weights_D

    def update(self, state: ProgressShareState, report: Report) -> ProgressShareState:
        new_D = read_losses(report.losses_D, report, self.config.policy, "losses", state.domains)
        if new_D is None:
            return state
        fallen_D = torch.nan_to_num(state.losses_D - new_D, nan=0.0).clamp(min=0.0)
        total = float(fallen_D.sum())
        weights_D = with_floor(fallen_D / total, self.config.floor) if total > 0.0 else state.weights_D
        return dataclasses.replace(state, weights_D=weights_D, losses_D=keep_last(state.losses_D, new_D))

    def diagnostics(self, state: ProgressShareState) -> Mapping[str, float | list[float]]:
        return {"entropy_nats": entropy(state.weights_D), "last_losses": state.losses_D.tolist()}

"""Group DRO: weight goes to the domains with the highest loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weftlm.errors import ConfigError
from weftlm.mixture.config import GroupDroConfig, PolicyConfig, policies
from weftlm.mixture.mirror import MirrorPolicy, MirrorState, initial_weights
from weftlm.mixture.policy import CONSTANT, MixtureSetting, Report, with_floor
from weftlm.mixture.signals import read_losses


@dataclass(frozen=True)
class GroupDroState(MirrorState):
    """What Group DRO knows; a group's value is its loss, nats per token.

    Attributes:
        offsets_D: C / sqrt(n_i), nats per token.
    """

    offsets_D: Tensor = dataclasses.field(metadata=CONSTANT)


@policies.register(
    "group_dro",
    does="moves weight to the domain with the highest loss",
    costs="nothing",
    paper="arXiv:1911.08731",
)
class GroupDroPolicy(MirrorPolicy[GroupDroConfig, GroupDroState]):
    """Distributionally robust optimisation over domains.

        q_i = q_i exp(eta (L_i + C / sqrt(n_i))) / sum_j q_j exp(eta (L_j + C / sqrt(n_j)))

    A domain not drawn since the last report keeps its last loss; one never drawn keeps its weight. The worst domain of
    a language model is often the one with the most entropy, not the one with the most to learn: q then runs to it and
    stays. DoReMi exists for that reason.

    Where this differs from the paper. There, q multiplies the loss of a batch at every step; here q is what is sampled,
    every T_r steps.

    Paper: Sagawa, Koh, Hashimoto, Liang, arXiv 1911.08731.
    """

    Config: ClassVar[type[PolicyConfig]] = GroupDroConfig

    def init(self, setting: MixtureSetting) -> GroupDroState:
        config = self.config
        start_D = with_floor(initial_weights(config.initial, setting, config.policy), config.floor)
        offsets_D = torch.zeros_like(start_D)
        if config.adjustment > 0.0:
            empty = [name for name, n in zip(setting.domains, setting.tokens_D.tolist(), strict=True) if not n > 0]
            if empty:
                raise ConfigError(f"mixture.adjustment divides by training tokens, and {', '.join(empty)} has none")
            offsets_D = config.adjustment / setting.tokens_D.to(torch.float64).sqrt()
        return GroupDroState.at(start_D, setting.domains, offsets_D=offsets_D)

    def measured(self, state: GroupDroState, report: Report) -> Tensor | None:
        return read_losses(report.losses_D, report, self.config.policy, "losses", state.groups)

    def exponents(self, state: GroupDroState, values_G: Tensor) -> Tensor:
        return self.config.eta * (values_G + state.offsets_D)

    def diagnostics(self, state: GroupDroState) -> Mapping[str, float | list[float]]:
        return {**super().diagnostics(state), "last_losses": state.values_G.tolist()}

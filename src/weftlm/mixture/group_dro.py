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
from weftlm.mixture.initial import initial_weights
from weftlm.mixture.policy import CONSTANT, MixtureSetting, Policy, Report, entropy, exponentiated_gradient, with_floor
from weftlm.mixture.signals import keep_last, max_abs, read_losses


@dataclass(frozen=True)
class GroupDroState:
    """What Group DRO knows.

    Attributes:
        weights_D: q, the weights.
        losses_D: each domain's last loss, nats per token; NaN until it was first drawn.
        updates: reports that moved the weights.
        skipped: reports in which no domain was drawn; they changed nothing.
        offsets_D: C / sqrt(n_i), nats per token.
        domains: names, for messages.
    """

    weights_D: Tensor
    losses_D: Tensor
    updates: int
    skipped: int
    offsets_D: Tensor = dataclasses.field(metadata=CONSTANT)
    domains: tuple[str, ...] = dataclasses.field(metadata=CONSTANT)


@policies.register(
    "group_dro",
    does="moves weight to the domain with the highest loss",
    costs="nothing",
    paper="arXiv:1911.08731",
)
class GroupDroPolicy(Policy[GroupDroConfig]):
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
        if config.adjustment > 0.0:
            empty = [name for name, n in zip(setting.domains, setting.tokens_D.tolist(), strict=True) if not n > 0]
            if empty:
                raise ConfigError(f"mixture.adjustment divides by training tokens, and {', '.join(empty)} has none")
            offsets_D = config.adjustment / setting.tokens_D.to(torch.float64).sqrt()
        else:
            offsets_D = torch.zeros_like(start_D)
        return GroupDroState(
            weights_D=start_D,
            losses_D=torch.full_like(start_D, torch.nan),
            updates=0,
            skipped=0,
            offsets_D=offsets_D,
            domains=setting.domains,
        )

    def weights(self, state: GroupDroState) -> Tensor:
        return state.weights_D

    def update(self, state: GroupDroState, report: Report) -> GroupDroState:
        config = self.config
        new_D = read_losses(report.losses_D, report, config.policy, "losses", state.domains)
        if new_D is None:
            return dataclasses.replace(state, skipped=state.skipped + 1)
        losses_D = keep_last(state.losses_D, new_D)
        exponents_D = config.eta * (losses_D + state.offsets_D)
        return dataclasses.replace(
            state,
            weights_D=with_floor(exponentiated_gradient(state.weights_D, exponents_D), config.floor),
            losses_D=losses_D,
            updates=state.updates + 1,
        )

    def diagnostics(self, state: GroupDroState) -> Mapping[str, float | list[float]]:
        return {
            "max_exponent": max_abs(self.config.eta * (state.losses_D + state.offsets_D)),
            "entropy_nats": entropy(state.weights_D),
            "updates": float(state.updates),
            "skipped": float(state.skipped),
            "last_losses": state.losses_D.tolist(),
        }

"""DoReMi: weight goes to the domains where the model is furthest behind a reference model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weftlm.mixture.config import DoremiConfig, PolicyConfig, policies
from weftlm.mixture.initial import initial_weights
from weftlm.mixture.policy import CONSTANT, MixtureSetting, Policy, Report, entropy, exponentiated_gradient, with_floor
from weftlm.mixture.signals import keep_last, max_abs, read_losses, running_mean


@dataclass(frozen=True)
class DoremiState:
    """What DoReMi knows.

    Attributes:
        current_D: weights after the last step.
        average_D: mean of the weights after each update so far; the initial weights before the first.
        excess_D: each domain's last excess loss, nats per token; NaN until it was first drawn.
        updates: reports that moved the weights.
        skipped: reports in which no domain was drawn; they changed nothing.
        domains: names, for messages.
    """

    current_D: Tensor
    average_D: Tensor
    excess_D: Tensor
    updates: int
    skipped: int
    domains: tuple[str, ...] = dataclasses.field(metadata=CONSTANT)


@policies.register(
    "doremi",
    does="moves weight to domains where the model is furthest behind a reference model",
    costs="the training of the reference, and its forward pass on every batch",
    paper="arXiv:2305.10429",
)
class DoremiPolicy(Policy[DoremiConfig]):
    """Minimax mixture over the excess loss, run online.

        lambda_i = mean over the tokens x of domain i of max(l(x) - l_ref(x), 0)
        alpha'_i = alpha_i exp(eta lambda_i) / sum_j alpha_j exp(eta lambda_j)
        alpha    = (1 - c) alpha' + c / D                                           c = smoothing
        mean     = (1/n) sum of alpha over the n updates so far

    Subtracting a reference model's loss takes out what no model learns of a domain; clipping is per token, before the
    mean. A domain not drawn since the last report keeps its last excess loss; one never drawn keeps its weight.

    Where this differs from the paper. There, a proxy model is trained on uniformly drawn domains with alpha multiplying
    the losses, an update at every step, and only the mean of alpha is kept, for a larger model. Here the one model in
    training is sampled by alpha every T_r steps. To repeat the paper, train a small model with `policy: doremi`, and
    give its `average` to `policy: static`.

    Paper: Xie et al., arXiv 2305.10429.
    """

    Config: ClassVar[type[PolicyConfig]] = DoremiConfig

    def init(self, setting: MixtureSetting) -> DoremiState:
        config = self.config
        start_D = with_floor(initial_weights(config.initial, setting, config.policy), config.smoothing)
        return DoremiState(
            current_D=start_D,
            average_D=start_D,
            excess_D=torch.full_like(start_D, torch.nan),
            updates=0,
            skipped=0,
            domains=setting.domains,
        )

    def weights(self, state: DoremiState) -> Tensor:
        return state.average_D if self.config.sample == "average" else state.current_D

    def update(self, state: DoremiState, report: Report) -> DoremiState:
        config = self.config
        new_D = read_losses(report.excess_losses_D, report, config.policy, "reference_losses", state.domains)
        if new_D is None:
            return dataclasses.replace(state, skipped=state.skipped + 1)
        excess_D = keep_last(state.excess_D, new_D)
        current_D = with_floor(exponentiated_gradient(state.current_D, config.eta * excess_D), config.smoothing)
        return dataclasses.replace(
            state,
            current_D=current_D,
            average_D=running_mean(state.average_D, current_D, state.updates),
            excess_D=excess_D,
            updates=state.updates + 1,
        )

    def diagnostics(self, state: DoremiState) -> Mapping[str, float | list[float]]:
        return {
            "max_exponent": max_abs(self.config.eta * state.excess_D),
            "entropy_nats": entropy(self.weights(state)),
            "updates": float(state.updates),
            "skipped": float(state.skipped),
            "excess_losses": state.excess_D.tolist(),
            "average": state.average_D.tolist(),
        }

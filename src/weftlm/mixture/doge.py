"""DoGE: weight goes to the domains whose gradient helps all the others, or a target outside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weftlm.mixture.config import DogeConfig, PolicyConfig, policies
from weftlm.mixture.initial import initial_weights
from weftlm.mixture.policy import CONSTANT, MixtureSetting, Policy, Report, entropy, exponentiated_gradient, with_floor
from weftlm.mixture.signals import keep_last, max_abs, read_alignment, running_mean


@dataclass(frozen=True)
class DogeState:
    """What DoGE knows.

    Attributes:
        current_D: weights after the last mirror step.
        average_D: mean of the weights after each update so far; the initial weights before the first.
        alignment_D: each domain's last scaled alignment; NaN until it was first seen.
        max_exponent: max_i |eta W_i| of the last update.
        updates: reports that moved the weights.
        skipped: reports that told nothing and changed nothing.
        domains: names, for messages.
    """

    current_D: Tensor
    average_D: Tensor
    alignment_D: Tensor
    max_exponent: float
    updates: int
    skipped: int
    domains: tuple[str, ...] = dataclasses.field(metadata=CONSTANT)


@policies.register(
    "doge",
    does="moves weight to domains whose gradient points where the mean of all does, or the target's",
    costs="as `dga`",
    paper="arXiv:2310.15393",
)
class DogePolicy(Policy[DogeConfig]):
    """Domain reweighting with generalization estimation, run online.

        W_i     = < grad L_i, v >, scaled as `normalize` says
        v       = (1/D) sum_j grad L_j, or grad L_target with `target: true`
        alpha_i = alpha_i exp(eta W_i) / sum_j alpha_j exp(eta W_j)
        mean    = (1/n) sum of alpha over the n updates so far

    Where this differs from the paper. There, a small proxy model is trained first: every domain gives a mini-batch at
    every step, alpha multiplies the losses, eta is the learning rate of that step over mu, v is the sum (not the mean)
    over domains, and only the average of alpha is kept, as the fixed mixture of the model that counts. Here there is no
    proxy run: the mixture of the one model in training follows alpha by sampling, every T_r steps, at a constant eta.
    To repeat the paper, train a small model with `policy: doge`, and give its `average` to `policy: static`.

    A generalist W_i includes the domain's own gradient: under noisy probes its variance adds to the domain's score.

    Paper: Fan, Pagliardini, Jaggi, arXiv 2310.15393.
    """

    Config: ClassVar[type[PolicyConfig]] = DogeConfig

    def init(self, setting: MixtureSetting) -> DogeState:
        config = self.config
        start_D = with_floor(initial_weights(config.initial, setting, config.policy), config.floor)
        return DogeState(
            current_D=start_D,
            average_D=start_D,
            alignment_D=torch.full_like(start_D, torch.nan),
            max_exponent=0.0,
            updates=0,
            skipped=0,
            domains=setting.domains,
        )

    def weights(self, state: DogeState) -> Tensor:
        return state.average_D if self.config.sample == "average" else state.current_D

    def update(self, state: DogeState, report: Report) -> DogeState:
        config = self.config
        new_D = read_alignment(report, config, self.config.direction, state.domains)
        if new_D is None:
            return dataclasses.replace(state, skipped=state.skipped + 1)
        alignment_D = keep_last(state.alignment_D, new_D)
        exponents_D = config.eta * alignment_D
        current_D = with_floor(exponentiated_gradient(state.current_D, exponents_D), config.floor)
        return dataclasses.replace(
            state,
            current_D=current_D,
            average_D=running_mean(state.average_D, current_D, state.updates),
            alignment_D=alignment_D,
            max_exponent=max_abs(exponents_D),
            updates=state.updates + 1,
        )

    def diagnostics(self, state: DogeState) -> Mapping[str, float | list[float]]:
        return {
            "max_exponent": state.max_exponent,
            "entropy_nats": entropy(self.weights(state)),
            "updates": float(state.updates),
            "skipped": float(state.skipped),
            "alignment": state.alignment_D.tolist(),
            "average": state.average_D.tolist(),
        }

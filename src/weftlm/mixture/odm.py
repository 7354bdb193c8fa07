"""Online data mixing: an EXP3 bandit whose reward is the training loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weftlm.mixture.config import OdmConfig, PolicyConfig, policies
from weftlm.mixture.policy import CONSTANT, MixturePolicy, MixtureSetting, Report, entropy
from weftlm.mixture.signals import max_abs, read_losses
from weftlm.mixture.uniform import uniform_weights


@dataclass(frozen=True)
class OdmState:
    """What the bandit knows.

    Attributes:
        weights_D: pi, the policy.
        rewards_D: R, moving average of importance-weighted rewards, nats per token.
        turns: t, reports learned from since the warm-up.
        skipped: reports during the warm-up, or in which no domain was drawn; they changed nothing.
        domains: names, for messages.
    """

    weights_D: Tensor
    rewards_D: Tensor
    turns: int
    skipped: int
    domains: tuple[str, ...] = dataclasses.field(metadata=CONSTANT)


def exploration(domains: int, turn: int) -> float:
    """E_t = min(1/D, sqrt(ln D / (D t))), and 1/D at t = 0: the probability every domain has at least."""
    if turn == 0:
        return 1.0 / domains
    return min(1.0 / domains, math.sqrt(math.log(domains) / (domains * turn)))


@policies.register(
    "odm",
    does="plays a bandit for the highest losses",
    costs="nothing",
    paper="arXiv:2312.02406",
)
class OdmPolicy(MixturePolicy[OdmConfig, OdmState]):
    """Online data mixing by an adversarial bandit: a domain is an arm, its training loss the reward.

        R_i <- decay R_i + (1 - decay) L_i / pi_i                        for the domains drawn; the others keep theirs
        E_t  = min(1/D, sqrt(ln D / (D t)))
        pi_i = (1 - D E_t) exp(E_{t-1} R_i) / sum_j exp(E_{t-1} R_j) + E_t

    A domain counts as drawn when the report has tokens of it. t counts updates, not optimizer steps. Since R is an
    average (not EXP3's growing sum) and E_t falls, the exponents fall too: the mixture returns slowly towards uniform.
    The division by pi_i assumes one draw per update; over T_r steps nearly every domain is drawn, and the division
    lifts rarely drawn domains further than in the paper's setting.

    Where this differs from the paper. There, an update follows every optimizer step.

    Paper: Albalak, Pan, Raffel, Wang, arXiv 2312.02406.
    """

    Config: ClassVar[type[PolicyConfig]] = OdmConfig

    def init(self, setting: MixtureSetting) -> OdmState:
        start_D = uniform_weights(len(setting.domains))
        return OdmState(
            weights_D=start_D, rewards_D=torch.zeros_like(start_D), turns=0, skipped=0, domains=setting.domains
        )

    def weights(self, state: OdmState) -> Tensor:
        return state.weights_D

    def update(self, state: OdmState, report: Report) -> OdmState:
        config = self.config
        losses_D = read_losses(report.losses_D, report, config.policy, "losses", state.domains)
        if losses_D is None or report.step <= config.warmup_steps:
            return dataclasses.replace(state, skipped=state.skipped + 1)
        turn, domains = state.turns + 1, len(state.domains)
        seen_D = config.decay * state.rewards_D + (1.0 - config.decay) * losses_D / state.weights_D
        rewards_D = torch.where(torch.isnan(losses_D), state.rewards_D, seen_D)
        share = exploration(domains, turn)
        gibbs_D = torch.softmax(exploration(domains, turn - 1) * rewards_D, dim=0)
        return dataclasses.replace(
            state,
            weights_D=(1.0 - domains * share) * gibbs_D + share,
            rewards_D=rewards_D,
            turns=turn,
        )

    def diagnostics(self, state: OdmState) -> Mapping[str, float | list[float]]:
        domains = len(state.domains)
        return {
            "max_exponent": exploration(domains, max(state.turns - 1, 0)) * max_abs(state.rewards_D),
            "entropy_nats": entropy(state.weights_D),
            "exploration": exploration(domains, state.turns),
            "updates": float(state.turns),
            "skipped": float(state.skipped),
            "rewards": state.rewards_D.tolist(),
        }

"""DoGE: weight goes to the domains whose gradient helps all the others, or a target outside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from weftlm.mixture.config import DogeConfig, PolicyConfig, policies
from weftlm.mixture.mirror import MirrorPolicy, MirrorState
from weftlm.mixture.policy import Report
from weftlm.mixture.signals import read_alignment


@policies.register(
    "doge",
    does="moves weight to domains whose gradient points where the mean of all does, or the target's",
    costs="as `dga`",
    paper="arXiv:2310.15393",
)
class DogePolicy(MirrorPolicy[DogeConfig, MirrorState]):
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

    def measured(self, state: MirrorState, report: Report) -> Tensor | None:
        return read_alignment(report, self.config, self.config.direction, state.groups)

    def weights(self, state: MirrorState) -> Tensor:
        return state.smooth_G if self.config.sample == "average" else state.mirror_G

    def diagnostics(self, state: MirrorState) -> Mapping[str, float | list[float]]:
        return {
            **super().diagnostics(state),
            "alignment": state.values_G.tolist(),
            "average": state.smooth_G.tolist(),
        }

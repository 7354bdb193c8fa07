"""DoReMi: weight goes to the domains where the model is furthest behind a reference model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from weftlm.mixture.config import DoremiConfig, PolicyConfig, policies
from weftlm.mixture.mirror import MirrorPolicy, MirrorState
from weftlm.mixture.policy import Report
from weftlm.mixture.signals import read_losses


@policies.register(
    "doremi",
    does="moves weight to domains where the model is furthest behind a reference model",
    costs="the training of the reference, and its forward pass on every batch",
    paper="arXiv:2305.10429",
)
class DoremiPolicy(MirrorPolicy[DoremiConfig, MirrorState]):
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
    floor: ClassVar[str] = "smoothing"

    def measured(self, state: MirrorState, report: Report) -> Tensor | None:
        return read_losses(report.excess_losses_D, report, self.config.policy, "reference_losses", state.groups)

    def weights(self, state: MirrorState) -> Tensor:
        return state.smooth_G if self.config.sample == "average" else state.mirror_G

    def diagnostics(self, state: MirrorState) -> Mapping[str, float | list[float]]:
        return {
            **super().diagnostics(state),
            "excess_losses": state.values_G.tolist(),
            "average": state.smooth_G.tolist(),
        }

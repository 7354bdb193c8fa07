"""Prefix evidence and per-token gates together: a choice coherent over modules, with room for the token's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from weftlm.experts.expert import Expert
from weftlm.routing.config import BlendConfig, PhatgooseConfig, RouterConfig, routers
from weftlm.routing.phatgoose import PhatgooseRouter
from weftlm.routing.prefix import PrefixRouter
from weftlm.routing.router import Call, Need, Routing, TargetModule


@routers.register(
    "blend",
    does="follows the text by n-grams and lets the gates move it, per token and module",
    costs="as `phatgoose` and `prefix` together",
)
class BlendRouter(PrefixRouter):
    """The posterior of `prefix`, moved in every module by the scores of PHATGOOSE's gates.

        p  proportional to  pi_z(t) exp( w (c_z - mean_z c_z) )

    with pi the posterior of `prefix` and c_z the gate's score of `phatgoose`. The k experts of highest p work with
    weights p_z, the mean of all experts with the rest. w = 0 is `prefix`.

    An addition of weftlm's. That local and global routing complement each other is the finding of GLIDER,
    arXiv:2410.07172, which asks a language model for the global part.
    """

    Config: ClassVar[type[RouterConfig]] = BlendConfig
    needs: ClassVar[frozenset[Need]] = frozenset({"gate", "statistics"})
    config: BlendConfig

    def __init__(self, config: BlendConfig, experts: Sequence[Expert], targets: Sequence[TargetModule]) -> None:
        super().__init__(config, experts, targets)
        self.gates = PhatgooseRouter(PhatgooseConfig(), experts, targets)

    def route(self, target: TargetModule, u_BTI: Tensor, call: Call) -> Routing:
        posterior_BTE: Tensor = call.decisions["posterior"]
        scores_BTS = self.gates.all_scores(target, u_BTI)
        local_BTS = scores_BTS - scores_BTS.mean(dim=-1, keepdim=True)
        log_BTE = posterior_BTE.clamp_min(torch.finfo(torch.float32).tiny).log()
        moved_BTE = log_BTE.index_add(-1, self.gates.places(target), self.config.gate_weight * local_BTS)
        return self._choose(torch.softmax(moved_BTE, dim=-1))

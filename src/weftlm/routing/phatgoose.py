"""PHATGOOSE: post-hoc gates trained by each contributor alone choose experts per token and per module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from weftlm.experts.expert import Expert
from weftlm.routing.config import PhatgooseConfig, RouterConfig, routers
from weftlm.routing.prototypes import StandardisedRouter, standardise
from weftlm.routing.router import Need, Site


@routers.register(
    "phatgoose",
    does="takes the k experts whose trained gate is nearest, per token and module",
    costs="gates, 100 steps per expert; a prefill among 166 experts 1.3 (hidden size 2048) to 2.2 (512) times "
    "the base's, a decoded token 1.2 to 1.7 times",
    paper="arXiv:2402.05859",
)
class PhatgooseRouter(StandardisedRouter):
    """Per token and per module, the k experts whose gates agree best with the module's input.

        c_z = standardise(u) . standardise(v_z) / sqrt(I)     v_z: the expert's gate of this module, I its input width
        p   = softmax over the k highest c_z                  y = W u + sum_z p_z scale_z B_z A_z u

    Standardisation is to zero mean and unit biased variance over the I entries, epsilon 1e-5. The sigmoid of gate
    training is not used here, and the weights multiply what experts give, not what they read.

    Paper: Muqeeth, Liu, Liu, Raffel, ICML 2024, arXiv:2402.05859. `temperature`, `abstain_below` and `share` are
    choices of this implementation; their defaults change nothing.
    """

    Config: ClassVar[type[RouterConfig]] = PhatgooseConfig
    needs: ClassVar[frozenset[Need]] = frozenset({"gate"})
    config: PhatgooseConfig

    def prototypes(self, experts: Sequence[Expert], site: Site) -> Tensor:
        gates_EI = torch.stack([expert.gate.vectors[site.name] for expert in experts if expert.gate is not None])
        return standardise(gates_EI) if self.config.standardise else gates_EI

    def scores(self, best_BTK: Tensor, u_BTI: Tensor) -> Tensor:
        if self.config.standardise:
            return super().scores(best_BTK, u_BTI)
        scaled_BTK: Tensor = best_BTK / u_BTI.shape[-1] ** 0.5
        return scaled_BTK

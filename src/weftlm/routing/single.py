"""One expert for everything, as if its adapter were merged into the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from weftlm.experts.expert import Expert
from weftlm.routing.config import RouterConfig, SingleConfig, routers
from weftlm.routing.router import Router, Site, place_of


@routers.register(
    "single",
    does="takes one expert you name",
    costs="nothing; folded into the weights",
)
class SingleRouter(Router):
    """y = W u + scale_z B_z A_z u for one expert z: the best single expert, or the oracle's choice for a data set."""

    Config: ClassVar[type[RouterConfig]] = SingleConfig

    def __init__(self, config: SingleConfig, experts: Sequence[Expert], sites: Sequence[Site]) -> None:
        super().__init__(config, experts, sites)
        weights_E = torch.zeros(len(experts))
        weights_E[place_of(config.expert, self.names)] = 1.0
        self.register_buffer("weights_E", weights_E, persistent=False)

    @property
    def static_weights_E(self) -> Tensor:
        return self.get_buffer("weights_E")

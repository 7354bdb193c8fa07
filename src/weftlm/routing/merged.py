"""Merging: one average of all experts, the same for every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from weftlm.errors import ConfigError
from weftlm.experts.expert import Expert
from weftlm.routing.config import MergedConfig, RouterConfig, routers
from weftlm.routing.router import Router, Site, place_of


@routers.register(
    "merged",
    does="averages all updates, the same for every token",
    costs="nothing; folded into the weights",
)
class MergedRouter(Router):
    """W + sum_z w_z scale_z B_z A_z in every module: outer products averaged, and nothing left to do at run time.

    Averaging A and B separately would be something else.
    """

    Config: ClassVar[type[RouterConfig]] = MergedConfig

    def __init__(self, config: MergedConfig, experts: Sequence[Expert], sites: Sequence[Site]) -> None:
        super().__init__(config, experts, sites)
        weights_E = torch.full((len(experts),), 1.0 / len(experts))
        if config.weights is not None:
            weights_E = torch.zeros(len(experts))
            for name, weight in config.weights.items():
                weights_E[place_of(name, self.names)] = weight
        if not bool(weights_E.isfinite().all()):
            raise ConfigError(f"router.weights {config.weights} must be finite")
        self.register_buffer("weights_E", weights_E, persistent=False)

    @property
    def static_weights_E(self) -> Tensor:
        return self.get_buffer("weights_E")

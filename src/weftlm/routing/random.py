"""Random routing: what choosing experts blindly gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from weftlm.experts.expert import Expert
from weftlm.routing.config import RandomConfig, RouterConfig, routers
from weftlm.routing.prototypes import StandardisedRouter, standardise
from weftlm.routing.router import Site


@routers.register(
    "random",
    does="takes k experts by random vectors; a floor to compare with",
    costs="as `phatgoose`, without gates",
)
class RandomRouter(StandardisedRouter):
    """As PHATGOOSE, with gates drawn from a normal distribution: the floor any trained gate must beat."""

    Config: ClassVar[type[RouterConfig]] = RandomConfig
    config: RandomConfig

    def prototypes(self, experts: Sequence[Expert], site: Site) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + site.index)
        return standardise(torch.randn(len(experts), site.width, generator=generator))

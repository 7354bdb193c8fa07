"""Random routing: what choosing experts blindly gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from weftlm.config import Seed
from weftlm.experts.expert import Expert
from weftlm.routing.prototypes import PrototypeConfig, StandardisedRouter, standardise
from weftlm.routing.router import RouterConfig, Site, routers


class RandomConfig(PrototypeConfig):
    """Configuration of `random`."""

    router: Literal["random"] = "random"
    seed: Seed = Field(0, description="of the vectors drawn in place of gates")


@routers.register("random")
class RandomRouter(StandardisedRouter):
    """As PHATGOOSE, with gates drawn from a normal distribution: the floor any trained gate must beat."""

    Config: ClassVar[type[RouterConfig]] = RandomConfig
    config: RandomConfig

    def prototypes(self, experts: Sequence[Expert], site: Site) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + site.index)
        return standardise(torch.randn(len(experts), site.width, generator=generator))

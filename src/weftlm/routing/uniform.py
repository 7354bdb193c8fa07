"""The uniform mixture of all experts, computed token by token: a floor, and a check of `merged`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from weftlm.routing.config import RouterConfig, UniformConfig, routers
from weftlm.routing.router import Call, Router, Routing, Site


@routers.register(
    "uniform",
    does="gives every expert the same weight; a floor to compare with",
    costs="nothing; folded into the weights",
)
class UniformRouter(Router):
    """Every expert with weight 1 / N on every token: y = W u + (1/N) sum_z scale_z B_z A_z u.

    The same numbers as `merged`, at the cost of running all experts.
    """

    Config: ClassVar[type[RouterConfig]] = UniformConfig
    in_pieces: ClassVar[bool] = True

    def route(self, site: Site, u_BTI: Tensor, call: Call) -> Routing:
        experts_K = torch.tensor(site.experts, device=u_BTI.device)
        shape = (*u_BTI.shape[:2], len(site.experts))
        weights = torch.full(shape, 1.0 / len(self.names), device=u_BTI.device)
        return Routing(experts_K.expand(shape), weights)

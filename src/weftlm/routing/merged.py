"""Routers whose weights never change: folded into the base's weights once, so that nothing is routed at run time.

W + sum_z w_z scale_z B_z A_z in every module: outer products are averaged, since averaging A and B separately
would be something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from weftlm.errors import ConfigError, did_you_mean
from weftlm.experts.expert import Expert
from weftlm.routing.config import MergedConfig, RouterConfig, SingleConfig, UniformConfig, routers
from weftlm.routing.router import Call, Router, Routing, TargetModule


class FixedRouter(Router):
    """Weights w_E that are the same for every token and module.

    Raises:
        ConfigError: a weight is given for an expert that the pool does not have.
    """

    def __init__(self, config: RouterConfig, experts: Sequence[Expert], targets: Sequence[TargetModule]) -> None:
        super().__init__(config, experts, targets)
        given = self.given()
        for name in given:
            if name not in self.names:
                raise ConfigError(f"the pool has no expert {name!r}{did_you_mean(name, self.names)}")
        weights_E = torch.tensor([given.get(name, 0.0) for name in self.names])
        self.register_buffer("weights_E", weights_E, persistent=False)

    def given(self) -> Mapping[str, float]:
        """w_z by name; 0 for those left out."""
        return dict.fromkeys(self.names, 1.0 / len(self.names))

    @property
    def static_weights_E(self) -> Tensor:
        return self.get_buffer("weights_E")

    def route(self, target: TargetModule, u_BTI: Tensor, call: Call) -> Routing:
        """The same weights for every token, where they could not be folded."""
        weights_E = self.static_weights_E
        used_K = weights_E.nonzero().flatten()
        shape = (*u_BTI.shape[:2], len(used_K))
        return Routing(used_K.expand(shape), weights_E[used_K].expand(shape))


@routers.register(
    "uniform",
    does="gives every expert the same weight; a floor to compare with",
    costs="nothing; folded into the weights",
)
class UniformRouter(FixedRouter):
    """w_z = 1 / N: y = W u + (1/N) sum_z scale_z B_z A_z u."""

    Config: ClassVar[type[RouterConfig]] = UniformConfig


@routers.register(
    "merged",
    does="averages all updates, the same for every token",
    costs="nothing; folded into the weights",
)
class MergedRouter(FixedRouter):
    """Weights by name, those not named 0; 1 / N for each where none are given."""

    Config: ClassVar[type[RouterConfig]] = MergedConfig
    config: MergedConfig

    def given(self) -> Mapping[str, float]:
        return super().given() if self.config.weights is None else self.config.weights


@routers.register(
    "single",
    does="takes one expert you name",
    costs="nothing; folded into the weights",
)
class SingleRouter(FixedRouter):
    """y = W u + scale_z B_z A_z u for one expert z: the best single expert, or the oracle's choice for a data set."""

    Config: ClassVar[type[RouterConfig]] = SingleConfig
    config: SingleConfig

    def given(self) -> Mapping[str, float]:
        return {self.config.expert: 1.0}

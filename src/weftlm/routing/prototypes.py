"""Routers that keep one vector per expert and module and choose by a token's inner products with them.

What differs from one to the next is where the vectors come from and how a product becomes a score.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from weftlm.experts.expert import Expert
from weftlm.routing.config import PrototypeConfig, RouterConfig
from weftlm.routing.router import Call, Router, Routing, TargetModule, buffer_name

log = logging.getLogger(__name__)

EPSILON = 1e-5
"""Added to variances in standardisation."""


class PrototypeRouter(Router):
    """Scores by prototype vectors, the k best experts, a softmax over them.

        s_z = score(<u, v_z>)        p = softmax over the k highest s_z / temperature

    All in float32. Subclasses give the vectors and may change the scores.
    """

    Config: ClassVar[type[RouterConfig]] = PrototypeConfig
    config: PrototypeConfig

    def __init__(self, config: PrototypeConfig, experts: Sequence[Expert], targets: Sequence[TargetModule]) -> None:
        super().__init__(config, experts, targets)
        blank: dict[str, list[str]] = {}
        for target in targets:
            prototypes_EI = self.prototypes([experts[place] for place in target.experts], target)
            empty_E = prototypes_EI.abs().amax(dim=1) == 0
            for place in empty_E.nonzero().flatten().tolist():
                blank.setdefault(experts[target.experts[place]].name, []).append(target.name)
            # A vector of zeros scores 0 and would beat every negative score: such an expert is never chosen, unless
            # none of the module has a vector.
            penalty_E = torch.where(empty_E & ~empty_E.all(), -torch.inf, 0.0)
            self.register_buffer(f"{buffer_name(target)}:v", prototypes_EI.float(), persistent=False)
            self.register_buffer(f"{buffer_name(target)}:penalty", penalty_E, persistent=False)
            self.register_buffer(f"{buffer_name(target)}:experts", torch.tensor(target.experts), persistent=False)
        self.penalised = {target.name for target in targets if bool(self._of(target, "penalty").isinf().any())}
        self.complete = {target.name for target in targets if target.experts == tuple(range(len(experts)))}
        for name, modules in blank.items():
            log.warning(
                "expert %s has an empty %s vector in %d modules (%s ...): it is not chosen there while another has one",
                name, config.router, len(modules), modules[0],
            )  # fmt: skip

    @abstractmethod
    def prototypes(self, experts: Sequence[Expert], target: TargetModule) -> Tensor:
        """The vectors of a module's experts, EI."""

    def adjust(self, products_BTE: Tensor) -> Tensor:
        """What is ranked: a function of the products that keeps the order of the scores."""
        return products_BTE

    def scores(self, best_BTK: Tensor, u_BTI: Tensor) -> Tensor:
        """Scores of the chosen, from their adjusted products."""
        return best_BTK

    def route(self, target: TargetModule, u_BTI: Tensor, call: Call) -> Routing:
        u_BTI = u_BTI.float()
        ranked_BTE = self.adjust(u_BTI @ self._of(target, "v").T)
        if target.name in self.penalised:
            ranked_BTE = ranked_BTE + self._of(target, "penalty")
        best_BTK, place_BTK = ranked_BTE.topk(min(self.config.k, len(target.experts)), dim=-1)
        scores_BTK = self.scores(best_BTK, u_BTI)
        weights_BTK = torch.softmax(scores_BTK / self.config.temperature, dim=-1)
        if self.config.abstain_below is not None:
            weights_BTK = weights_BTK * (scores_BTK[..., :1] >= self.config.abstain_below)
        experts_BTK = place_BTK if target.name in self.complete else self._of(target, "experts")[place_BTK]
        return Routing(experts_BTK, weights_BTK)

    def all_scores(self, target: TargetModule, u_BTI: Tensor) -> Tensor:
        """Scores of every expert of a module, in the order of `target.experts`; 0 for an empty vector."""
        u_BTI = u_BTI.float()
        return self.scores(self.adjust(u_BTI @ self._of(target, "v").T), u_BTI)

    def places(self, target: TargetModule) -> Tensor:
        """Places in the pool of a module's experts."""
        places_E: Tensor = self._of(target, "experts")
        return places_E

    def _of(self, target: TargetModule, kind: str) -> Any:
        return self._buffers[f"{buffer_name(target)}:{kind}"]


def standardise(v_EI: Tensor) -> Tensor:
    """Zero mean and unit (biased) variance over the last axis: (v - mean) / sqrt(var + 1e-5); zeros stay zeros."""
    centred_EI = v_EI - v_EI.mean(dim=-1, keepdim=True)
    return centred_EI / torch.sqrt(v_EI.var(dim=-1, correction=0, keepdim=True) + EPSILON)


class StandardisedRouter(PrototypeRouter):
    """Scores between standardised vectors.

        c_z = standardise(u) . standardise(v_z) / sqrt(I)

    Because a standardised v has zero mean, standardise(u) . vbar = (u . vbar) / sqrt(var(u) + eps): one product with
    the raw input, and the scalar, which no ranking needs, only on the chosen.
    """

    def scores(self, best_BTK: Tensor, u_BTI: Tensor) -> Tensor:
        scores_BTK: Tensor = best_BTK * (inverse_deviation(u_BTI) * u_BTI.shape[-1] ** -0.5)
        return scores_BTK


def inverse_deviation(u_BTI: Tensor) -> Tensor:
    """1 / sqrt(var + 1e-5) over the last axis, BT1, with the biased variance."""
    if torch.is_grad_enabled() and u_BTI.requires_grad:
        return torch.rsqrt(u_BTI.var(dim=-1, correction=0, keepdim=True) + EPSILON)
    # As layer normalisation finds it, several times as fast on a CPU as `var`; it has no gradient there.
    found_BT1: Tensor = torch.native_layer_norm(u_BTI, [u_BTI.shape[-1]], None, None, EPSILON)[2]
    return found_BT1

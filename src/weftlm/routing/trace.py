"""What a routed model did: the experts of each token in each module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weftlm.routing.router import Routing

MEAN = "(mean of all)"
"""The name under which a trace lists the mean of all experts, where a router uses it."""


@dataclass(frozen=True)
class Trace:
    """The routing of one sequence.

    Attributes:
        tokens: Token ids of the sequence.
        experts: Names of the experts, in the pool's order; last `(mean of all)` where the router uses it.
        modules: Adapted modules that read these tokens, in the order of execution.
        weights_STE: Weight of each expert at each module (S) and token, float32; rows sum to 1, or to 0 where the base
            is left alone.
    """

    tokens: tuple[int, ...]
    experts: tuple[str, ...]
    modules: tuple[str, ...]
    weights_STE: Tensor

    @property
    def token_weights_TE(self) -> Tensor:
        """Mean over the modules: the experts' weights on each token."""
        return self.weights_STE.mean(dim=0)

    @property
    def usage_SE(self) -> Tensor:
        """Mean over the tokens: the experts' weights in each module."""
        return self.weights_STE.mean(dim=1)

    @property
    def entropy_S(self) -> Tensor:
        """Entropy of each module's usage, nats; ln(E) when all experts are used alike, 0 when one is alone."""
        usage_SE = self.usage_SE.double()
        entropy_S: Tensor = torch.special.entr(usage_SE).sum(dim=1)
        return entropy_S

    def layers(self) -> dict[str, list[int]]:
        """Rows of the modules of each layer, by the layer's name, in order."""
        found: dict[str, list[int]] = {}
        for row, target in enumerate(self.modules):
            found.setdefault(layer_of(target), []).append(row)
        return found

    def to_json(self) -> dict[str, Any]:
        """JSON: per module and token the experts with their weights, usage and entropy per layer and module."""
        return {
            "tokens": list(self.tokens),
            "experts": list(self.experts),
            "modules": [
                {
                    "name": target,
                    "layer": layer_of(target),
                    "entropy_nats": float(self.entropy_S[row]),
                    "usage": _named(self.usage_SE[row], self.experts),
                    "tokens": [_named(weights_E, self.experts) for weights_E in self.weights_STE[row]],
                }
                for row, target in enumerate(self.modules)
            ],
            "token_weights": [_named(weights_E, self.experts) for weights_E in self.token_weights_TE],
            "max_entropy_nats": math.log(len(self.experts)),
        }


def layer_of(target: str) -> str:
    """A module's layer: its name up to and with the first number, `model.layers.3`; itself where it has none."""
    parts = target.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: place + 1])
    return target


def traces_of(ids_BT: Tensor, real_BT: Tensor, experts: Sequence[str], routings: Mapping[str, Routing]) -> list[Trace]:
    """The trace of each sequence of a batch, without its padding.

    Args:
        ids_BT: Token ids.
        real_BT: True for tokens, False for padding.
        experts: Names, in the pool's order.
        routings: Routing by module, in the order of execution.
    """
    weights_SBTE = torch.zeros(len(routings), *ids_BT.shape, len(experts) + 1)
    for weights_BTE, routing in zip(weights_SBTE, routings.values(), strict=True):
        weights_BTE.scatter_add_(-1, routing.experts_BTK.cpu(), routing.weights_BTK.float().cpu())
        if routing.background_BT is not None:
            weights_BTE[..., -1] = routing.background_BT
    with_mean = any(routing.background_BT is not None for routing in routings.values())
    names = (*experts, MEAN) if with_mean else tuple(experts)
    return [
        Trace(tuple(ids_T[real_T].tolist()), names, tuple(routings), weights_STE[:, real_T.cpu(), : len(names)])
        for ids_T, real_T, weights_STE in zip(ids_BT, real_BT, weights_SBTE.unbind(1), strict=True)
    ]


def _named(weights_E: Tensor, experts: Sequence[str]) -> dict[str, float]:
    return {experts[place]: float(weights_E[place]) for place in weights_E.nonzero().flatten().tolist()}

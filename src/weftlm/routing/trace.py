"""What a routed model did: the experts of each token in each module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weftlm.routing.router import Routing, TargetModule

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


def make_trace(
    tokens: Sequence[int],
    experts: Sequence[str],
    seen: Mapping[str, tuple[TargetModule, Routing]],
    row: int,
    real_T: Tensor,
) -> Trace:
    """The trace of one sequence of a batch.

    Args:
        tokens: its ids without padding.
        experts: names, in the pool's order.
        seen: target and routing by module, in the order of execution.
        row: its place in the batch.
        real_T: True for its tokens, False for padding.
    """
    weights = []
    for _, routing in seen.values():
        chosen_TK = routing.experts_BTK[row][real_T].cpu()
        weights_TE = torch.zeros(chosen_TK.shape[0], len(experts) + 1)
        weights_TE.scatter_add_(1, chosen_TK, routing.weights_BTK[row][real_T].float().cpu())
        if routing.background_BT is not None:
            weights_TE[:, -1] = routing.background_BT[row][real_T].float().cpu()
        weights.append(weights_TE)
    weights_STE = torch.stack(weights)
    if any(routing.background_BT is not None for _, routing in seen.values()):
        return Trace(tuple(tokens), (*experts, MEAN), tuple(seen), weights_STE)
    return Trace(tuple(tokens), tuple(experts), tuple(seen), weights_STE[..., :-1])


def _named(weights_E: Tensor, experts: Sequence[str]) -> dict[str, float]:
    return {experts[place]: float(weights_E[place]) for place in weights_E.nonzero().flatten().tolist()}

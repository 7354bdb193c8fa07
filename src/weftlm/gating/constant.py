"""The constant gate: fixed weights over the experts, whatever the sequence."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from weftlm.gating.arrays import simplex_vector
from weftlm.gating.config import ConstantConfig, GateConfig, gates
from weftlm.gating.gate import Features, Gate


@gates.register(
    "constant",
    does="the same weights for every sequence; the best mixture of experts",
    costs="minutes to fit; as `bayes` to run, which is its exact causal form",
)
class ConstantGate(Gate):
    """A mixture of the experts.

        log g(x, k) = log softmax(a)_k                  a_E: learned, 0 at first (uniform)

    Always in G_1: pi_g is a mixture of distributions, Z = 1. Its exact causal form is the `bayes` gate with these
    weights as prior.
    """

    Config: ClassVar[type[GateConfig]] = ConstantConfig
    learned: ClassVar[tuple[str, ...]] = ("logits_E",)

    @classmethod
    def init(cls, config: ConstantConfig, experts: int, features: Features, seed: int) -> Self:
        return cls(config, experts, {"logits_E": torch.zeros(experts, dtype=torch.float64)})

    @classmethod
    def of(cls, weights_E: Any) -> Self:
        """The gate with these weights.

        Raises:
            ConfigError: they are not a probability vector.
        """
        weights = torch.from_numpy(simplex_vector(weights_E, "weights_E", len(weights_E)))
        return cls(ConstantConfig(), len(weights), {"logits_E": weights.log()})

    def log_weights(self, features: Features) -> Tensor:
        return torch.log_softmax(self.tensors["logits_E"], dim=0).expand(len(features), -1)

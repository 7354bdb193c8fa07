"""The linear gate: a softmax over linear functions of the sequence's features."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from weftlm.gating.config import GateConfig, LinearConfig, gates
from weftlm.gating.gate import Features, Gate, Need
from weftlm.gating.standard import SEQUENCE, feature_width, standardisation, standardised


@gates.register(
    "linear",
    does="logistic regression on features of the whole sequence",
    costs="minutes to fit on a CPU, near-linear in sequences; to write, distil it",
)
class LinearGate(Gate):
    """Multinomial logistic regression on the features.

        log g(x, k) = log softmax(W f~(x) + b)_k            f~ = (f - mean) / scale over the data of the fit

    W and b are learned and 0 at first (uniform). On `sequence_features` of sequences of one length T it holds the
    posterior of every mixture: slope T on `below_best`, prior in b.
    """

    Config: ClassVar[type[GateConfig]] = LinearConfig
    needs: ClassVar[frozenset[Need]] = SEQUENCE
    learned: ClassVar[tuple[str, ...]] = ("weight_EF", "bias_E")
    shrunk: ClassVar[tuple[str, ...]] = ("weight_EF",)
    config: LinearConfig

    @classmethod
    def init(cls, config: LinearConfig, experts: int, features: Features, seed: int) -> Self:
        constants = standardisation(features, config.gate)
        weight_EF = torch.zeros(experts, len(constants["mean_F"]), dtype=torch.float64)
        bias_E = torch.zeros(experts, dtype=torch.float64)
        named = LinearConfig(features=config.features or features.names)
        return cls(named, experts, {"weight_EF": weight_EF, "bias_E": bias_E, **constants})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        width = feature_width(self, self.config.features)
        return {
            "weight_EF": (self.experts, width),
            "bias_E": (self.experts,),
            "mean_F": (width,),
            "scale_F": (width,),
        }

    def log_weights(self, features: Features) -> Tensor:
        values_BF = standardised(self, self.config.features, features)
        return torch.log_softmax(values_BF @ self.tensors["weight_EF"].T + self.tensors["bias_E"], dim=-1)

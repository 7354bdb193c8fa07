"""The MLP gate: the linear gate plus one hidden layer."""

from __future__ import annotations

import math
from typing import ClassVar, Self

import torch
from torch import Tensor

from weftlm.gating.config import GateConfig, MlpConfig, gates
from weftlm.gating.gate import Features, Gate, Need
from weftlm.gating.standard import SEQUENCE, feature_width, standardisation, standardised


@gates.register(
    "mlp",
    does="the same with a hidden layer",
    costs="as `linear`; wants hundreds of sequences per domain",
)
class MlpGate(Gate):
    """A linear gate and a correction by one hidden layer.

        log g(x, k) = log softmax(W f~ + b + U tanh(V f~ + c))_k        f~ = (f - mean) / scale over the data of the fit

    W, b and U are 0 at first (uniform); V is normal with variance 1 / F, c normal, by the seed.
    """

    Config: ClassVar[type[GateConfig]] = MlpConfig
    needs: ClassVar[frozenset[Need]] = SEQUENCE
    learned: ClassVar[tuple[str, ...]] = ("weight_EF", "bias_E", "out_EH", "in_HF", "in_H")
    shrunk: ClassVar[tuple[str, ...]] = ("weight_EF", "out_EH")
    config: MlpConfig

    @classmethod
    def init(cls, config: MlpConfig, experts: int, features: Features, seed: int) -> Self:
        constants = standardisation(features, config.gate)
        width, hidden = len(constants["mean_F"]), config.hidden
        generator = torch.Generator().manual_seed(seed)
        zeros = {"weight_EF": (experts, width), "bias_E": (experts,), "out_EH": (experts, hidden)}
        in_HF = torch.randn(hidden, width, generator=generator, dtype=torch.float64) / math.sqrt(max(width, 1))
        in_H = torch.randn(hidden, generator=generator, dtype=torch.float64)
        named = MlpConfig(hidden=hidden, features=config.features or features.names)
        tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in zeros.items()}
        return cls(named, experts, {**tensors, "in_HF": in_HF, "in_H": in_H, **constants})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        width, hidden = feature_width(self, self.config.features), self.config.hidden
        return {
            "weight_EF": (self.experts, width),
            "bias_E": (self.experts,),
            "out_EH": (self.experts, hidden),
            "in_HF": (hidden, width),
            "in_H": (hidden,),
            "mean_F": (width,),
            "scale_F": (width,),
        }

    def log_weights(self, features: Features) -> Tensor:
        values_BF = standardised(self, self.config.features, features)
        at = self.tensors
        hidden_BH = torch.tanh(values_BF @ at["in_HF"].T + at["in_H"])
        logits_BE = values_BF @ at["weight_EF"].T + at["bias_E"] + hidden_BH @ at["out_EH"].T
        return torch.log_softmax(logits_BE, dim=-1)

"""The linear gate: a softmax over linear functions of the sequence's features."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from weftlm.errors import ConfigError
from weftlm.gating.config import GateConfig, LinearConfig, gates
from weftlm.gating.gate import Features, Gate, Need

SEQUENCE: frozenset[Need] = frozenset({"sequence"})


def standardisation(features: Features, gate: str) -> dict[str, Tensor]:
    """mean_F and scale_F of the features a gate is fitted on, float64; a constant feature keeps scale 1."""
    values_BF = features.get("sequence", gate).to(torch.float64)
    mean_F = values_BF.mean(dim=0)
    scale_F = values_BF.std(dim=0, correction=0)
    steady_F = scale_F > 1e-9 * (1.0 + mean_F.abs())
    return {"mean_F": mean_F, "scale_F": torch.where(steady_F, scale_F, torch.ones_like(scale_F))}


def standardised(gate: Gate, names: tuple[str, ...], features: Features) -> Tensor:
    """(f - mean) / scale, BF, in the gate's float type.

    Raises:
        ConfigError: the features are not those the gate was fitted on.
    """
    values_BF = features.get("sequence", gate.config.gate)
    mean_F, scale_F = gate.tensors["mean_F"], gate.tensors["scale_F"]
    if values_BF.shape[1] != len(mean_F) or (names and features.names and names != features.names):
        raise ConfigError(
            f"gate {gate.config.gate!r} was made for {len(mean_F)} features {list(names)}; {values_BF.shape[1]} came: "
            f"{list(features.names)}"
        )
    return (values_BF.to(mean_F.dtype) - mean_F) / scale_F


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

    def log_weights(self, features: Features) -> Tensor:
        values_BF = standardised(self, self.config.features, features)
        return torch.log_softmax(values_BF @ self.tensors["weight_EF"].T + self.tensors["bias_E"], dim=-1)

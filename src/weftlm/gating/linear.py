"""The gates over whole sequences: a softmax of one row of weights, of a row per point, or of a linear function."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from weftlm.errors import ConfigError
from weftlm.gating.arrays import simplex_vector
from weftlm.gating.config import ConstantConfig, GateConfig, LinearConfig, TabularConfig, gates
from weftlm.gating.gate import Features, Gate, Need

SEQUENCE: frozenset[Need] = frozenset({"sequence"})


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


@gates.register(
    "tabular",
    does="a free weight for every point of an enumerated support",
    costs="as many parameters as points; for small problems",
)
class TabularGate(Gate):
    """Free weights at every point: any gate there is, on a support small enough to list.

    log g(x, k) = log softmax(a_x)_k                a_XE: learned, 0 at first (uniform)
    """

    Config: ClassVar[type[GateConfig]] = TabularConfig
    needs: ClassVar[frozenset[Need]] = frozenset({"points"})
    learned: ClassVar[tuple[str, ...]] = ("logits_XE",)
    config: TabularConfig

    @classmethod
    def init(cls, config: TabularConfig, experts: int, features: Features, seed: int) -> Self:
        points = config.points or int(features.get("points", config.gate).max()) + 1
        logits_XE = torch.zeros(points, experts, dtype=torch.float64)
        return cls(TabularConfig(points=points), experts, {"logits_XE": logits_XE})

    def log_weights(self, features: Features) -> Tensor:
        points_B = features.get("points", self.config.gate)
        points = self.tensors["logits_XE"].shape[0]
        if len(points_B) and not 0 <= int(points_B.min()) <= int(points_B.max()) < points:
            raise ConfigError(
                f"points {int(points_B.min())} to {int(points_B.max())} came to a tabular gate over {points} points"
            )
        return torch.log_softmax(self.tensors["logits_XE"][points_B], dim=-1)


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


def standardisation(features: Features, gate: str) -> dict[str, Tensor]:
    """mean_F and scale_F of the features a gate is fitted on, float64; a constant feature keeps scale 1."""
    return moments(features.get("sequence", gate).to(torch.float64))


def moments(values_NF: Tensor) -> dict[str, Tensor]:
    """mean_F and scale_F of values; a constant column keeps scale 1."""
    mean_F, scale_F = values_NF.mean(dim=0), values_NF.std(dim=0, correction=0)
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

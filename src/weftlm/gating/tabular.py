"""The tabular gate: one row of weights per point of an enumerated support."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from weftlm.errors import ConfigError
from weftlm.gating.config import GateConfig, TabularConfig, gates
from weftlm.gating.gate import Features, Gate, Need


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

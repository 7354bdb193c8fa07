"""What gates over sequence features share: which features, and their standardisation."""

from __future__ import annotations

import torch
from torch import Tensor

from weftlm.errors import ConfigError
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


def feature_width(gate: Gate, names: tuple[str, ...]) -> int:
    """F of a gate over named features; of unnamed ones, as many as it was standardised on."""
    mean_F = gate.tensors.get("mean_F")
    return len(names) or (0 if mean_F is None else len(mean_F))

"""Derivatives along v from two forward passes: composes with whatever can run forward, at a known loss of accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from weftlm.errors import ConfigError
from weftlm.evaluation.perplexity import evaluation_mode
from weftlm.models.hf import SequenceLosses
from weftlm.training.config import AlignmentConfig, estimators
from weftlm.training.estimators.contract import NO_NORMS, Cost, Estimator, Facts, Probe
from weftlm.training.estimators.direction import (
    check_direction,
    chunks,
    in_step,
    is_sharded,
    norm,
    reshard,
    trainable_parameters,
    without_data_parallel,
)


def finite_difference(
    model: nn.Module,
    losses: SequenceLosses,
    tokens_BT1: Tensor,
    direction: Mapping[str, Tensor],
    *,
    relative_epsilon: float = 3e-4,
    micro_batch: int | None = None,
) -> Tensor:
    """<grad L_b, v> of every sequence by a central difference, without dropout.

        ( L_b(theta + h v) - L_b(theta - h v) ) / 2h  =  <grad L_b, v> + O(h^2),       h = epsilon ||theta|| / ||v||

    The loss's own rounding divided by h is the other part of the error: 0.01 to 1.4% together in float32, a few
    percent under bfloat16 autocast. Cost: 2F per training batch's worth of sequences and a copy of the trainable
    parameters, which are back to their every bit afterwards. Do not call it between a forward pass and its backward
    pass. The padding row of an embedding, which backward passes leave out, counts here where it is used.

    Args:
        model: see `gradient_direction`.
        losses: see `SequenceLosses`.
        tokens_BT1: this rank's probe sequences.
        direction: v.
        relative_epsilon: epsilon, the length of a step relative to that of the parameters; 1e-4 to 1e-3 serve float32,
            1e-3 bfloat16 autocast.
        micro_batch: sequences per forward pass; None takes all at once.
    Returns:
        dots_B: float32 (float64 for a float64 model); 0 where v is 0.
    Raises:
        ConfigError: parameters narrower than float32, which cannot hold so small a step.
    """
    module = without_data_parallel(model)
    parameters = trainable_parameters(model)
    check_direction(direction, parameters)
    narrow = sorted(name for name, parameter in parameters.items() if parameter.dtype.itemsize < 4)
    if narrow:
        raise ConfigError(
            f"{narrow[0]} is {parameters[narrow[0]].dtype}, in which a finite difference vanishes; keep parameters in "
            f"float32 or use the shadow estimator"
        )
    length = norm(direction.values())
    if length == 0.0:
        return torch.zeros(len(tokens_BT1), device=tokens_BT1.device)
    step = relative_epsilon * norm([parameter.detach() for parameter in parameters.values()]) / length
    sharded = is_sharded(parameters.values())
    sides = []
    with torch.no_grad(), evaluation_mode(module), _restored(parameters) as origin:
        for sign in (1.0, -1.0):
            for name, parameter in parameters.items():
                parameter.copy_(origin[name] + sign * step * direction[name])
            torch.clear_autocast_cache()  # it would hand out the parameters before they moved
            pieces = chunks(tokens_BT1, micro_batch)
            passes = in_step(pieces, tokens_BT1.device) if sharded else ((piece, True) for piece in pieces)
            found = [losses_B for losses_B, counts in ((losses(module, one), it) for one, it in passes) if counts]
            reshard(module)
            sides.append(torch.cat(found) if found else torch.zeros(0, device=tokens_BT1.device))
    return (sides[0] - sides[1]) / (2.0 * step)


@contextmanager
def _restored(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Copies of the parameters, put back on the way out whatever happens."""
    origin = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield origin
    finally:
        for name, parameter in parameters.items():
            parameter.copy_(origin[name])
        torch.clear_autocast_cache()


@estimators.register(
    "finite_difference",
    does="a central difference of losses along the direction",
    costs="two forward passes per group, and rounding errors",
)
class FiniteDifference(Estimator):
    """A central difference of two forward passes."""

    merits: ClassVar[Mapping[Probe, str]] = {"extra": "needs forward passes only"}
    exact = False

    def obstacle(self, facts: Facts) -> str | None:
        if facts.needs_norms:
            return NO_NORMS
        return "parameters in less than float32 cannot hold its steps" if facts.narrow else None

    def cost(self, facts: Facts, probe: Probe) -> Cost:
        return Cost(forwards=2.0, parameter_passes=4.0, bytes_per_parameter=4.0)

    def dots(
        self,
        model: nn.Module,
        losses: SequenceLosses,
        tokens_BT1: Tensor,
        direction: Mapping[str, Tensor],
        config: AlignmentConfig,
        micro_batch: int | None,
    ) -> Tensor:
        coarse = torch.is_autocast_enabled(tokens_BT1.device.type)
        epsilon = config.relative_epsilon or (1e-3 if coarse else 3e-4)
        return finite_difference(
            model, losses, tokens_BT1, direction, relative_epsilon=epsilon, micro_batch=micro_batch
        )

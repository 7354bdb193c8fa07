"""Alignments from the gradient as it accumulates over micro-batches, each of one group: almost free.

    c_j = <accumulated gradient after micro-batch j, v>         <sum_b w_b g_b over micro-batch j, v> = c_j - c_{j-1}

Cost: one dot product over the parameters per micro-batch (+0.6% of a step measured), and V.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from weftlm.errors import ConfigError
from weftlm.training.config import estimators
from weftlm.training.estimators.contract import NO_NORMS, SHARDED, BatchProbe, Cost, Estimator, Facts, Probe
from weftlm.training.estimators.direction import check_direction, dot, high_precision, is_sharded


class CumulativeDots:
    """Reads the alignment of each micro-batch off the accumulating `.grad`.

        meter = CumulativeDots(parameters, direction)
        for tokens_BT1, coefficients_B in micro_batches:             # each of one group
            with model.no_sync():                                    # under DDP: every one, also the last
                (coefficients_B * losses(model, tokens_BT1)).sum().backward()
            dots_B = meter.dots(coefficients_B)
        ...average gradients over ranks, then optimizer.step()

    Differences of an accumulated sum lose bits to cancellation, so `.grad` must be float32 or wider (4e-7 then; 3% in
    bfloat16). They are of this rank's gradient only before DDP has averaged it, hence `no_sync` throughout.

    Args:
        parameters: the trainable parameters by the direction's names. What `.grad` already holds is the starting point.
        direction: v.
    Raises:
        ConfigError: the direction is of another model, or gradients are sharded or narrower than float32.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], direction: Mapping[str, Tensor]) -> None:
        check_direction(direction, parameters)
        if is_sharded(parameters.values()):
            raise ConfigError(
                "cumulative dots need this rank's own gradient, and sharded gradients arrive averaged; "
                "use separate or finite_difference"
            )
        narrow = sorted(name for name, parameter in parameters.items() if parameter.dtype.itemsize < 4)
        if narrow:
            raise ConfigError(
                f"{narrow[0]} accumulates its gradient in {parameters[narrow[0]].dtype}, too coarse for differences; "
                f"keep parameters in float32 (autocast may still compute in bfloat16) or use the shadow estimator"
            )
        self._parameters = list(parameters.values())
        self._v = [direction[name] for name in parameters]
        self._before = self._read()

    def begin(self, batch_size: int) -> None:
        """Nothing: the last reading is the starting point of the next micro-batch."""

    def dots(self, coefficients_B: Tensor) -> Tensor:
        """The mean derivative over the micro-batch whose backward pass has just run.

        Args:
            coefficients_B: what each sequence's loss was multiplied by before `backward`, as in `ShadowProbe.dots`;
                equal ones give the plain mean of <g_b, v>, unequal ones the mean weighted by them.
        Returns:
            dots_B: that mean, once for each sequence, float64.
        Raises:
            ConfigError: the coefficients sum to 0.
        """
        total = high_precision(coefficients_B.detach()).sum()
        if float(total) == 0.0:
            raise ConfigError(
                "the micro-batch's loss coefficients sum to 0, so its gradient cannot be measured; leave it out, give "
                "the mixture a floor, or set alignment.probe: extra"
            )
        now = self._read()
        mean = (now - self._before.to(now.device)) / total.to(now.device)
        self._before = now
        return mean.expand(len(coefficients_B))

    def _read(self) -> Tensor:
        return dot([parameter.grad for parameter in self._parameters], self._v)


def average_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Average `.grad` over ranks, after a step whose every backward pass ran under `no_sync`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for parameter in parameters.values():
            if parameter.grad is None:  # every rank must take part, whatever its own batch used
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()


@estimators.register(
    "cumulative",
    does="differences of the accumulating gradient of micro-batches of one group each",
    costs="a read of the gradient per micro-batch",
)
class Cumulative(Estimator):
    """Differences of the accumulating gradient."""

    merits: ClassVar[Mapping[Probe, str]] = {"batch": "micro-batches of one group each make it nearly free"}
    pure = True

    def obstacle(self, facts: Facts) -> str | None:
        if facts.needs_norms:
            return NO_NORMS
        if facts.sharded:
            return SHARDED
        if facts.narrow:
            return "gradients accumulate in less than float32"
        if facts.accumulation_steps < facts.groups:
            return f"{facts.accumulation_steps} micro-batches are fewer than {facts.groups} groups"
        return None

    def cost(self, facts: Facts, probe: Probe) -> Cost:
        return Cost(forwards=0.0, parameter_passes=max(facts.accumulation_steps, facts.groups))

    @contextmanager
    def on_batch(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], direction: Mapping[str, Tensor]
    ) -> Iterator[BatchProbe]:
        yield CumulativeDots(parameters, direction)
        average_gradients(parameters)

"""The contract of an alignment estimator, and the facts about a run by which one is chosen.

    a_i = < grad L_i(theta), v >

An estimator is one file in this folder with a class under `@estimators.register("name")`. The choice, the plan and the
training loop ask the class what prevents it, what a measurement costs and how it measures; none of them knows a
name.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from weftlm.errors import ConfigError, NumericsError
from weftlm.mixture.policy import Alignment
from weftlm.models.hf import SequenceLosses
from weftlm.training.estimators.direction import high_precision, norm, sum_over_ranks

Place = Literal["batch", "extra"]
"""Where it is measured: on the sequences of the training step, or on sequences drawn for the purpose."""

NO_NORMS = "it gives no norm per group, which normalize: cosine needs"
SHARDED = "parameters are sharded over processes"


@dataclass(frozen=True)
class Facts:
    """What decides which estimators a run allows.

    Attributes:
        groups: domains, or basis distributions.
        batch_size: sequences per optimizer step over all processes.
        processes: processes that train together.
        needs_norms: whether the policy wants ||g_i|| (normalize: cosine).
        basis: whether groups are distributions over domains, to which no training sequence belongs.
        sharded: whether parameters are split over processes (FSDP2).
        dropout: whether the model trains with dropout.
    """

    groups: int
    batch_size: int
    processes: int = 1
    needs_norms: bool = False
    basis: bool = False
    sharded: bool = False
    dropout: bool = False


@dataclass(frozen=True)
class Cost:
    """What one measurement takes beside the direction v.

    Attributes:
        forwards: forward passes' worth of work per probed sequence; a backward pass counts as two.
        parameter_passes: reads or writes of all trainable parameters.
        reductions: gradients summed over processes, each as large as the trainable parameters.
        bytes_per_parameter: memory per trainable parameter.
    """

    forwards: float
    parameter_passes: float = 0.0
    reductions: int = 0
    bytes_per_parameter: float = 0.0


@dataclass(frozen=True)
class Probe:
    """Sequences drawn for measuring, and what they are measured along.

    Attributes:
        model: see `gradient_direction`.
        losses: see `SequenceLosses`.
        tokens_BT1: this rank's sequences; their number may differ between ranks.
        groups_B: group of each sequence, integers in 0 .. groups - 1.
        groups: G.
        direction: v, the same on every rank.
        micro_batch: sequences per pass; None takes all at once.
    """

    model: nn.Module
    losses: SequenceLosses
    tokens_BT1: Tensor
    groups_B: Tensor
    groups: int
    direction: Mapping[str, Tensor]
    micro_batch: int | None = None


class BatchProbe(Protocol):
    """Measures the derivative of every sequence of a batch while it is trained on."""

    def begin(self, batch_size: int) -> object:
        """Start a micro-batch, before its forward pass."""
        ...

    def dots(self, coefficients_B: Tensor) -> Tensor:
        """<grad L_b, v> of the micro-batch, after a backward pass of its losses times these coefficients."""
        ...


class Estimator:
    """One way to measure <g_i, v>; a subclass gives what its `merits` promise.

    Attributes:
        merits: each place it can measure in, with what speaks for it there.
    """

    merits: ClassVar[Mapping[Place, str]]

    def obstacle(self, facts: Facts) -> str | None:
        """Reason it cannot measure in this run, wherever it measures; None where it can."""
        return None

    def cost(self, facts: Facts, place: Place) -> Cost:
        """What a measurement takes."""
        raise NotImplementedError

    def on_batch(self, model: nn.Module, direction: Mapping[str, Tensor]) -> AbstractContextManager[BatchProbe]:
        """Measure the training batch: a block around all its micro-batches."""
        raise NotImplementedError

    def measure(self, probe: Probe) -> Alignment:
        """<g_i, v> of groups of sequences drawn for the purpose.

        Returns:
            an Alignment, the same on every rank; NaN and count 0 for a group no rank brought.
        """
        raise NotImplementedError


def batch_obstacle(facts: Facts, least_per_group: int) -> str | None:
    """Reason why no estimator can measure on the training batch; None where one can."""
    wanted = facts.groups * least_per_group
    if facts.basis:
        return "a training sequence belongs to a domain, not to a basis distribution"
    if facts.dropout:
        return "the model trains with dropout, which probes leave out"
    if wanted > facts.batch_size:
        return f"{wanted} sequences for {facts.groups} groups do not fit a batch of {facts.batch_size}"
    return None


def group_alignment(dots_B: Tensor, groups_B: Tensor, groups: int, direction: Mapping[str, Tensor]) -> Alignment:
    """Mean of the sequences' derivatives within each group.

        a_i = (1 / n_i) sum_{b in group i} <g_b, v>          sums and n_i are reduced over ranks, then divided

    Args:
        dots_B: <g_b, v> of this rank's sequences.
        groups_B: group of each, integers in 0 .. groups - 1.
        groups: G.
        direction: v, the same on every rank.
    Returns:
        an Alignment without norms, the same on every rank; NaN and count 0 where no rank had a sequence.
    Raises:
        ConfigError: lengths differ or a group is out of range.
        NumericsError: a derivative is not finite.
    """
    if dots_B.shape != groups_B.shape or dots_B.ndim != 1:
        raise ConfigError(
            f"dots_B has shape {tuple(dots_B.shape)} and groups_B {tuple(groups_B.shape)}; both must be (B,)"
        )
    if len(groups_B) and not 0 <= int(groups_B.min()) <= int(groups_B.max()) < groups:
        raise ConfigError(
            f"groups run from {int(groups_B.min())} to {int(groups_B.max())}; allowed are 0 to {groups - 1}"
        )
    dots_B = high_precision(dots_B.detach())
    groups_B = groups_B.to(dots_B.device)
    sums_2G = torch.zeros(2, groups, dtype=torch.float64, device=dots_B.device)
    sums_2G[0].index_add_(0, groups_B, dots_B)
    sums_2G[1].index_add_(0, groups_B, torch.ones_like(dots_B))
    device = next(iter(direction.values())).device  # where the process group can reduce
    sums_G, counts_G = sum_over_ranks(sums_2G if device.type == "mps" else sums_2G.to(device)).cpu()
    if not torch.isfinite(sums_G).all():
        odd = torch.nonzero(~torch.isfinite(sums_G)).flatten().tolist()
        raise NumericsError(f"the alignment of groups {odd} is not finite; their losses or gradients overflow")
    return Alignment(
        dots_G=torch.where(counts_G > 0, sums_G / counts_G, torch.nan),
        counts_G=counts_G.to(torch.int64),
        direction_norm=norm(direction.values()),
    )

"""The contract of an alignment estimator, and the facts about a run by which one is chosen.

    a_i = < grad L_i(theta), v >

An estimator is one file in this folder with a class under `@estimators.register("name")`. The choice, the plan and the
training loop ask the class what stands in its way, what a measurement costs and how it measures; none of them knows a
name.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from weftlm.mixture.policy import Alignment
from weftlm.models.hf import SequenceLosses
from weftlm.training.config import AlignmentConfig
from weftlm.training.estimators.groups import group_alignment

Probe = Literal["batch", "extra"]
"""Where it is measured: on the sequences of the training step, or on sequences drawn for the purpose."""

NO_NORMS = "it gives no norm per group, which normalize: cosine needs"
SHARDED = "parameters are sharded over processes"


@dataclass(frozen=True)
class Facts:
    """What decides which estimators a run allows.

    Attributes:
        groups: domains, or basis distributions.
        batch_size: sequences per optimizer step over all processes.
        accumulation_steps: micro-batches per optimizer step of one process.
        processes: processes that train together.
        needs_norms: whether the policy wants ||g_i|| (normalize: cosine).
        basis: whether groups are distributions over domains, to which no training sequence belongs.
        sharded: whether parameters are split over processes (FSDP2).
        narrow: whether a trainable parameter is held in less than float32.
        dropout: whether the model trains with dropout.
    """

    groups: int
    batch_size: int
    accumulation_steps: int = 1
    processes: int = 1
    needs_norms: bool = False
    basis: bool = False
    sharded: bool = False
    narrow: bool = False
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


class BatchProbe(Protocol):
    """Measures the derivative of every sequence of a batch while it is trained on."""

    def begin(self, batch_size: int) -> object:
        """Start a micro-batch, before its forward pass."""
        ...

    def dots(self, coefficients_B: Tensor) -> Tensor:
        """<grad L_b, v> of the micro-batch, after its backward pass.

        Args:
            coefficients_B: factor of each sequence's loss before `backward`.
        """
        ...


class Estimator:
    """One way to measure <g_i, v>; a subclass gives what its `merits` promise.

    Attributes:
        merits: each place it can measure in, with what speaks for it there.
        exact: whether its only error is rounding.
        oracle: whether it takes the backward passes that others are held against, and is right wherever they run.
        pure: on the batch, whether every micro-batch must hold one group alone, with gradients left on their process
            until the last one (the estimator then averages them itself).
    """

    merits: ClassVar[Mapping[Probe, str]]
    exact: ClassVar[bool] = True
    oracle: ClassVar[bool] = False
    pure: ClassVar[bool] = False

    def obstacle(self, facts: Facts) -> str | None:
        """Reason it cannot measure in this run, wherever it measures; None where it can."""
        return None

    def cost(self, facts: Facts, probe: Probe) -> Cost:
        """What a measurement takes."""
        raise NotImplementedError

    def on_batch(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], direction: Mapping[str, Tensor]
    ) -> AbstractContextManager[BatchProbe]:
        """Measure the training batch: a block around all its micro-batches."""
        raise NotImplementedError

    def dots(
        self,
        model: nn.Module,
        losses: SequenceLosses,
        tokens_BT1: Tensor,
        direction: Mapping[str, Tensor],
        config: AlignmentConfig,
        micro_batch: int | None,
    ) -> Tensor:
        """<grad L_b, v> of sequences drawn for the purpose, where they are found one by one."""
        raise NotImplementedError

    def measure(
        self,
        model: nn.Module,
        losses: SequenceLosses,
        tokens_BT1: Tensor,
        groups_B: Tensor,
        groups: int,
        direction: Mapping[str, Tensor],
        config: AlignmentConfig,
        *,
        micro_batch: int | None = None,
        process_group: ProcessGroup | None = None,
    ) -> Alignment:
        """Measure groups on sequences drawn for the purpose; the arguments are those of `alignment.probe_alignment`."""
        dots_B = self.dots(model, losses, tokens_BT1, direction, config, micro_batch)
        return group_alignment(dots_B, groups_B, groups, direction, process_group=process_group)


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

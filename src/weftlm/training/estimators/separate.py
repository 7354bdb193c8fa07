"""A backward pass per group: exact, with norms, the oracle of the other estimators.

Cost: a forward and a backward pass for every probe sequence (3F per training batch's worth). Gradients stream: one
group's is in memory at a time, never G of them; of a sharded model each rank holds its part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from weftlm.errors import ConfigError, NumericsError
from weftlm.evaluation.perplexity import evaluation_mode
from weftlm.mixture.policy import Alignment
from weftlm.models.hf import SequenceLosses
from weftlm.training.config import AlignmentConfig, estimators
from weftlm.training.estimators.contract import Cost, Estimator, Facts, Probe
from weftlm.training.estimators.direction import (
    add,
    check_direction,
    chunks,
    dot,
    gradients_by_backward,
    in_step,
    is_sharded,
    norm,
    sum_over_ranks,
    trainable_parameters,
    without_data_parallel,
    zeros,
)
from weftlm.training.estimators.groups import over_ranks


def separate_alignment(
    model: nn.Module,
    losses: SequenceLosses,
    batches: Iterable[tuple[int, Tensor]],
    direction: Mapping[str, Tensor],
    groups: int,
    *,
    process_group: ProcessGroup | None = None,
) -> Alignment:
    """Each group's gradient by a backward pass of its own, without dropout.

        g_i = (1 / n_i) sum_{b in group i} grad L_b,       a_i = <g_i, v>,       norms_i = ||g_i||

    Args:
        model: see `gradient_direction`.
        losses: see `SequenceLosses`.
        batches: (group, tokens_BT1) pairs in ascending group order; a group may come in several micro-batches, and
            different ranks may hold different ones. Read as a stream.
        direction: v, the same on every rank.
        groups: G.
        process_group: ranks to reduce over; None is the default group where one is initialised.
    Returns:
        an Alignment with norms, the same on every rank; NaN and count 0 for a group no rank brought.
    Raises:
        ConfigError: groups out of range or not ascending.
        NumericsError: a gradient is not finite.
    """
    module = without_data_parallel(model)
    parameters = trainable_parameters(model)
    check_direction(direction, parameters)
    sharded = is_sharded(parameters.values())
    device = next(iter(parameters.values())).device
    v = [direction[name] for name in parameters]
    rows_3G = torch.full((3, groups), torch.nan, dtype=torch.float64)
    rows_3G[2] = 0.0
    stream = iter(batches)
    pending = next(stream, None)

    def pieces_of(group: int) -> Iterator[Tensor]:
        nonlocal pending
        while pending is not None and pending[0] == group:
            yield pending[1]
            pending = next(stream, None)

    with evaluation_mode(module):
        for group in range(groups):
            gradient, count = zeros(parameters), 0
            if sharded:
                # Sharded gradients arrive averaged over ranks: scale so that their average is the sum.
                ranks = torch.distributed.get_world_size(process_group)
                for tokens_BT1, counts in in_step(pieces_of(group), device, process_group):
                    loss = losses(module, tokens_BT1).sum() * (counts * ranks)
                    add(gradient, gradients_by_backward(loss, parameters.values()))
                    count += counts * len(tokens_BT1)
            else:
                for tokens_BT1 in pieces_of(group):
                    loss = losses(module, tokens_BT1).sum()
                    add(gradient, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))
                    count += len(tokens_BT1)
            everyone = int(over_ranks(torch.tensor([float(count)], dtype=torch.float64), direction, process_group))
            if everyone:
                for part in gradient.values():
                    (part if sharded else sum_over_ranks(part, process_group)).div_(everyone)
                figures = [float(dot(gradient.values(), v)), norm(gradient.values()), float(everyone)]
                rows_3G[:, group] = torch.tensor(figures, dtype=torch.float64)
    if pending is not None:
        raise ConfigError(
            f"a batch of group {pending[0]} came out of turn; batches must come in ascending order of groups "
            f"0 to {groups - 1}"
        )
    dots_G, norms_G, counts_G = rows_3G
    if not torch.isfinite(norms_G[counts_G > 0]).all():
        odd = torch.nonzero((counts_G > 0) & ~torch.isfinite(norms_G)).flatten().tolist()
        raise NumericsError(f"the gradient of groups {odd} is not finite; their losses overflow")
    return Alignment(
        dots_G=dots_G, counts_G=counts_G.to(torch.int64), direction_norm=norm(direction.values()), norms_G=norms_G
    )


@estimators.register(
    "separate",
    does="a backward pass per group; exact for every model and layout",
    costs="a forward and a backward pass per group",
)
class Separate(Estimator):
    """A backward pass per group; works for every model and layout."""

    merits: ClassVar[Mapping[Probe, str]] = {"extra": "exact, with norms"}
    oracle = True

    def cost(self, facts: Facts, probe: Probe) -> Cost:
        reductions = facts.groups if facts.processes > 1 and not facts.sharded else 0
        return Cost(forwards=3.0, parameter_passes=facts.groups, reductions=reductions, bytes_per_parameter=4.0)

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
        ordered = (
            (g, piece) for g in groups_B.unique().tolist() for piece in chunks(tokens_BT1[groups_B == g], micro_batch)
        )
        return separate_alignment(model, losses, ordered, direction, groups, process_group=process_group)

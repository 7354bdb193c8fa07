"""From derivatives of single sequences to one alignment per group, over all ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from weftlm.errors import ConfigError, NumericsError
from weftlm.mixture.policy import Alignment
from weftlm.training.estimators.direction import high_precision, norm, sum_over_ranks


def group_alignment(
    dots_B: Tensor,
    groups_B: Tensor,
    groups: int,
    direction: Mapping[str, Tensor],
    *,
    process_group: ProcessGroup | None = None,
) -> Alignment:
    """Mean of the sequences' derivatives within each group.

        a_i = (1 / n_i) sum_{b in group i} <g_b, v>          sums and n_i are reduced over ranks, then divided

    Args:
        dots_B: <g_b, v> of this rank's sequences.
        groups_B: group of each, integers in 0 .. groups - 1.
        groups: G.
        direction: v, the same on every rank.
        process_group: ranks to reduce over; None is the default group where one is initialised.
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
    sums_G, counts_G = over_ranks(sums_2G, direction, process_group)
    if not torch.isfinite(sums_G).all():
        odd = torch.nonzero(~torch.isfinite(sums_G)).flatten().tolist()
        raise NumericsError(f"the alignment of groups {odd} is not finite; their losses or gradients overflow")
    return Alignment(
        dots_G=torch.where(counts_G > 0, sums_G / counts_G, torch.nan),
        counts_G=counts_G.to(torch.int64),
        direction_norm=norm(direction.values()),
    )


def over_ranks(sums: Tensor, direction: Mapping[str, Tensor], process_group: ProcessGroup | None) -> Tensor:
    """Sum over ranks on the model's device (an NCCL group cannot reduce CPU tensors), then bring to the CPU."""
    device = next(iter(direction.values())).device
    return sum_over_ranks(sums if device.type == "mps" else sums.to(device), process_group).cpu()


def with_batch_norm(alignment: Alignment, batch_norm: float) -> Alignment:
    """The alignment with the norm of the training gradient of the same step noted beside it."""
    return dataclasses.replace(alignment, batch_norm=batch_norm)

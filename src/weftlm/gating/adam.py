"""Adam as a pure function of its state, so that a fit that is saved and resumed takes the same steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """What `torch.optim.Adam` keeps, by tensor.

    Attributes:
        first: running means of the gradients.
        second: running means of their squares.
    """

    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]

    @classmethod
    def zeros(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """Those before the first step."""
        return cls(*({name: torch.zeros_like(each) for name, each in tensors.items()} for _ in range(2)))


def adam_step(
    theta: Mapping[str, Tensor], gradients: Mapping[str, Tensor], moments: Moments, *, step: int, lr: float
) -> tuple[dict[str, Tensor], Moments]:
    """One step of `torch.optim.Adam` with its default decay rates.

    Args:
        theta: tensors to move.
        gradients: their gradients.
        moments: as the steps so far left them.
        step: number of steps so far.
        lr: learning rate.
    Returns:
        The moved tensors and the new moments; what was given is not written to.
    """
    moved = {name: each.detach().clone() for name, each in theta.items()}
    if not moved:
        return moved, moments
    optimizer = torch.optim.Adam(moved.values(), lr=lr)
    for name, each in moved.items():
        each.grad = gradients[name]
        held = {"exp_avg": moments.first[name].clone(), "exp_avg_sq": moments.second[name].clone()}
        optimizer.state[each] = {"step": torch.tensor(float(step)), **held}
    optimizer.step()
    state = {name: optimizer.state[each] for name, each in moved.items()}
    for each in moved.values():
        each.grad = None
    return moved, Moments(
        {name: each["exp_avg"] for name, each in state.items()},
        {name: each["exp_avg_sq"] for name, each in state.items()},
    )

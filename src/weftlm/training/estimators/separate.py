"""A backward pass per group: exact, with norms, the oracle of the other estimators.

Cost: a forward and a backward pass for every probe sequence (3F per training batch's worth). One group's gradient is in
memory at a time, never G of them; of a sharded model each rank holds its part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from weftlm.errors import NumericsError
from weftlm.mixture.policy import Alignment
from weftlm.training.config import estimators
from weftlm.training.estimators.contract import Cost, Estimator, Facts, Place, Probe
from weftlm.training.estimators.direction import (
    check_direction,
    chunks,
    dot,
    mean_gradient,
    norm,
    trainable_parameters,
)


@estimators.register(
    "separate",
    does="a backward pass per group; exact for every model and layout",
    costs="a forward and a backward pass per group",
)
class Separate(Estimator):
    """Each group's gradient by a backward pass of its own, without dropout; works for every model and layout.

    g_i = (1 / n_i) sum_{b in group i} grad L_b,       a_i = <g_i, v>,       norms_i = ||g_i||
    """

    merits: ClassVar[Mapping[Place, str]] = {"extra": "exact, with norms"}

    def cost(self, facts: Facts, place: Place) -> Cost:
        reductions = facts.groups if facts.processes > 1 and not facts.sharded else 0
        return Cost(forwards=3.0, parameter_passes=facts.groups, reductions=reductions, bytes_per_parameter=4.0)

    def measure(self, probe: Probe) -> Alignment:
        """See `Estimator.measure`; with norms.

        Raises:
            NumericsError: a gradient is not finite.
        """
        direction = probe.direction
        check_direction(direction, trainable_parameters(probe.model))
        rows_3G = torch.full((3, probe.groups), torch.nan, dtype=torch.float64)
        for group in range(probe.groups):
            pieces = chunks(probe.tokens_BT1[probe.groups_B == group], probe.micro_batch)
            gradient, count = mean_gradient(probe.model, probe.losses, pieces)
            rows_3G[2, group] = count
            if count:
                v = [direction[name] for name in gradient]
                rows_3G[0, group], rows_3G[1, group] = float(dot(gradient.values(), v)), norm(gradient.values())
        dots_G, norms_G, counts_G = rows_3G
        odd_G = (counts_G > 0) & ~torch.isfinite(norms_G)
        if odd_G.any():
            odd = torch.nonzero(odd_G).flatten().tolist()
            raise NumericsError(f"the gradient of groups {odd} is not finite; their losses overflow")
        return Alignment(dots_G, counts_G.to(torch.int64), norm(direction.values()), norms_G)

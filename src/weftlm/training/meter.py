"""Losses by domain since the last report: sums on the device, reduced over ranks when asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DomainMeter:
    """Sums of losses by domain.

    Args:
        domains: D.
        device: where the sums live, so that metering needs no synchronisation.
    """

    COUNT, LOSS, REFERENCE, EXCESS = range(4)

    def __init__(self, domains: int, device: torch.device) -> None:
        self._sums_4D = torch.zeros(4, domains, dtype=torch.float64, device=device)
        self._with_reference = False

    def add(self, domains_B: Tensor, losses_BT: Tensor, reference_BT: Tensor | None) -> None:
        """Add a micro-batch: domain of each sequence, its token losses and the reference model's."""
        domains_B = domains_B.to(self._sums_4D.device)
        rows = [
            torch.ones(len(domains_B), dtype=torch.float64, device=self._sums_4D.device),
            losses_BT.double().mean(1),
        ]
        if reference_BT is not None:
            self._with_reference = True
            rows += [reference_BT.double().mean(1), (losses_BT - reference_BT).clamp(min=0).double().mean(1)]
        for row, values_B in enumerate(rows):
            self._sums_4D[row].index_add_(0, domains_B, values_B)

    def report(self, processes: int) -> dict[str, Tensor]:
        """Mean losses over all ranks since the last report, as fields of a `Report`; starts the next interval.

        NaN where nothing was drawn; without a reference model, `losses_D` alone.
        """
        sums = self._reduced(processes)
        self._sums_4D.zero_()
        means = sums[1:] / sums[self.COUNT]
        names = ("losses_D", "reference_losses_D", "excess_losses_D")
        return dict(zip(names if self._with_reference else names[:1], means, strict=False))

    def state_dict(self, processes: int) -> dict[str, Any]:
        """Sums over all ranks, exact in JSON."""
        return {"sums": self._reduced(processes).tolist(), "with_reference": self._with_reference}

    def load_state_dict(self, state: dict[str, Any], *, keep: bool) -> None:
        """Continue from stored sums; one rank keeps them and the others start at zero."""
        self._with_reference = bool(state["with_reference"])
        sums = torch.tensor(state["sums"], dtype=torch.float64)
        self._sums_4D.copy_(sums if keep else torch.zeros_like(sums))

    def _reduced(self, processes: int) -> Tensor:
        sums: Tensor = self._sums_4D.clone()
        if processes > 1:
            torch.distributed.all_reduce(sums)
        return sums.cpu()

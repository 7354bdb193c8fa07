"""The experts' factors, stacked once per module when a model is built; nothing is stacked again in a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weftlm.experts.expert import LoRAFactors
from weftlm.experts.low_rank import LowRank
from weftlm.routing.kernels import routed_delta
from weftlm.routing.router import Routing, TargetModule

RANK_MULTIPLE = 4
"""Ranks are padded with zeros to a multiple of it, as grouped matrix products want aligned strides."""


class ModulePool(LowRank):
    """All adapters of one module, several per token.

        delta = sum_k p_k scale_k B_k (A_k u)

    Args:
        target: The module.
        adapters: Its adapters, in the order of `target.experts`.
        experts: Number of experts of the whole pool.
        dtype, device: Dtype and device of the stacked factors.

    Attributes:
        place_E: Place of each of the pool's experts in this module's stack; -1 for those that do not adapt it.
    """

    place_E: Tensor
    mean_A_RI: Tensor | None
    mean_B_RO: Tensor | None

    def __init__(
        self,
        target: TargetModule,
        adapters: Sequence[LoRAFactors],
        experts: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(adapters, dtype, device, multiple=RANK_MULTIPLE)
        self.target = target
        place_E = torch.full((experts,), -1, dtype=torch.int64, device=device)
        place_E[list(target.experts)] = torch.arange(len(adapters), device=device)
        self.register_buffer("place_E", place_E, persistent=False)
        self.register_buffer("mean_A_RI", None, persistent=False)
        self.register_buffer("mean_B_RO", None, persistent=False)
        self.complete = len(adapters) == experts
        self.background_rank = 0

    def delta(self, u_BTI: Tensor, routing: Routing) -> Tensor:
        """The chosen experts' update of the module's output, BTO, in the factors' dtype.

        An expert that does not adapt this module adds nothing, whatever its weight.
        """
        experts_NK = routing.experts_BTK.flatten(0, -2)
        weights_NK = routing.weights_BTK.flatten(0, -2)
        if not self.complete:
            experts_NK = self.place_E[experts_NK]
            weights_NK = torch.where(experts_NK >= 0, weights_NK, 0.0)
            experts_NK = experts_NK.clamp_min(0)
        delta_NO = routed_delta(u_BTI.flatten(0, -2), experts_NK, weights_NK, self.A_ERI, self.B_ERO)
        delta_BTO = delta_NO.view(*u_BTI.shape[:-1], delta_NO.shape[-1])
        if routing.background_BT is None:
            return delta_BTO
        assert self.mean_A_RI is not None
        assert self.mean_B_RO is not None
        h_BTR = (u_BTI.to(self.mean_A_RI.dtype) @ self.mean_A_RI.T) * routing.background_BT[..., None]
        return delta_BTO + h_BTR.to(self.mean_B_RO.dtype) @ self.mean_B_RO

    def set_background(self, rank: int) -> None:
        """Make (or with rank 0 forget) the factors of the mean update, cut to a rank by singular values, unless made.

        By a randomised singular value decomposition with a fixed start (Halko et al. 2011, arXiv:0909.4061).
        """
        if rank == self.background_rank:
            return
        self.background_rank = rank
        self.mean_A_RI = self.mean_B_RO = None
        if not rank:
            return
        experts = len(self.place_E)
        mean_OI = self.dense_delta(torch.full((experts,), 1.0 / experts))
        rank = min(rank, *mean_OI.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            U_OR, s_R, V_IR = torch.svd_lowrank(mean_OI.cpu(), q=min(rank + 8, *mean_OI.shape), niter=4)
        root_R = s_R[:rank].sqrt()
        self.mean_A_RI = (V_IR[:, :rank] * root_R).T.contiguous().to(self.A_ERI)
        self.mean_B_RO = (U_OR[:, :rank] * root_R).T.contiguous().to(self.B_ERO)

    def dense_delta(self, weights_E: Tensor) -> Tensor:
        """sum_z w_z scale_z B_z A_z as one matrix, OI, float32, for weights that no token changes."""
        used_E = weights_E.to(self.A_ERI.device)[torch.tensor(self.target.experts, device=self.A_ERI.device)]
        weighted_ERO = self.B_ERO.float() * used_E.float()[:, None, None]
        return weighted_ERO.flatten(0, 1).T @ self.A_ERI.float().flatten(0, 1)

"""A linear module of the base model with the pool's adapters beside it.

The experts' factors are stacked once per module when a model is built; nothing is stacked again in a forward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weftlm.errors import ConfigError
from weftlm.experts.expert import LoRAFactors
from weftlm.experts.low_rank import LowRank
from weftlm.routing.kernels import routed_delta
from weftlm.routing.router import Call, Router, Routing, TargetModule

INSTALLED = "routed_pool"
"""Name of a pool among the parts of its module."""
RANK_MULTIPLE = 4
"""Ranks are padded with zeros to a multiple of it, as grouped matrix products want aligned strides."""


class Pass(threading.local):
    """The pass under way and what was given beside the model's own arguments; each thread has its own.

    Attributes:
        call: the pass, None between passes.
        decisive_BT: tokens a decision per sequence may read, None for all.
        prompt_tokens: length of the prompt, while `generate` runs.
        record: called with every decision.
    """

    def __init__(self) -> None:
        self.call: Call | None = None
        self.decisive_BT: Tensor | None = None
        self.prompt_tokens: int | None = None
        self.record: Callable[[TargetModule, Routing], None] | None = None

    def __reduce__(self) -> tuple[type[Pass], tuple[()]]:
        """A copy of a model is in no pass."""
        return Pass, ()


class Switch:
    """What the routed modules of one model share: the router, the pass under way, and whether routing is on."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.passing = Pass()
        self.enabled = True

    def begin(self, call: Call) -> None:
        """Tell the router of a pass and let the modules route it; in full precision also under autocast."""
        with torch.autocast(call.mask_BT.device.type, enabled=False):
            self.router.begin(call)
        self.passing.call = call

    def route(self, target: TargetModule, u_BTI: Tensor, call: Call) -> Routing:
        """Ask the router, in full precision also under autocast, and tell who wants to know."""
        device = u_BTI.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            routing = self.router.route(target, u_BTI, call)
        if call.record is not None:
            call.record(target, routing)
        return routing


class ModulePool(LowRank):
    """All adapters of one module, several per token, chosen by the router.

        y = W u + b + delta        delta = sum_k p_k scale_k B_k (A_k u)

    Installed it takes the place of the module's `forward` and is a part of the module, so that it moves with the model.
    The module's own forward is called as it is, quantised or not; switched off, the result is its own, bit for bit.

    Args:
        target: The module.
        adapters: Its adapters, in the order of `target.experts`.
        experts: Number of experts of the whole pool.
        dtype, device: Dtype and device of the stacked factors.

    Attributes:
        place_E: Place of each of the pool's experts in this module's stack; -1 for those that do not adapt it.
        folded: W + sum_z w_z scale_z B_z A_z for weights that never change, in the weight's own layout; else None.
    """

    base: nn.Module
    place_E: Tensor
    folded: Tensor | None
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
        self.register_buffer("folded", None, persistent=False)
        self.register_buffer("mean_A_RI", None, persistent=False)
        self.register_buffer("mean_B_RO", None, persistent=False)
        self.complete = len(adapters) == experts
        self.background_rank = 0

    def install(self, module: nn.Module, switch: Switch) -> None:
        """Route a module; everything it holds stays as it is."""
        self.switch = switch
        self.own_forward: Callable[..., Tensor] = module.forward
        self._before = vars(module).get("forward")
        vars(self)["base"] = module  # not as a part, since it has this one as a part
        module.add_module(INSTALLED, self)
        vars(module)["forward"] = self.forward

    def uninstall(self) -> None:
        """Give the module back as it was."""
        module: nn.Module = vars(self)["base"]
        module._modules.pop(INSTALLED)
        if self._before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = self._before

    def forward(self, u_XI: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output, routed; see the class."""
        call = self.switch.passing.call
        if not self.switch.enabled:
            return self.own_forward(u_XI, *args, **kwargs)
        if call is None:
            raise ConfigError(
                f"{self.target.name} was called outside a forward pass of the routed model, where no expert can be "
                "chosen for it; call the model or its decoder (get_decoder()), or use disabled() for the base alone"
            )
        if self.folded is not None:
            weight = self.folded.T if isinstance(self.base, Conv1D) else self.folded
            return F.linear(u_XI, weight, getattr(self.base, "bias", None))
        y_XO = self.own_forward(u_XI, *args, **kwargs)
        u_BTI = u_XI if u_XI.dim() == 3 else u_XI.reshape(call.mask_BT.shape[0], -1, u_XI.shape[-1])
        delta = self.delta(u_BTI, self.switch.route(self.target, u_BTI, call)).view(y_XO.shape)
        if torch.is_grad_enabled() and (y_XO.requires_grad or delta.requires_grad):
            return y_XO + delta.to(y_XO.dtype)
        return y_XO.add_(delta.to(y_XO.dtype))

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

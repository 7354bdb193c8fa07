"""A linear module of the base model with the pool's adapters beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weftlm.errors import ConfigError
from weftlm.routing.pool import ModulePool
from weftlm.routing.router import Call, Router, Routing, TargetModule


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


class RoutedLinear(nn.Module):
    """y = W u + b + sum_k p_k scale_k B_k A_k u, with experts and p chosen per token by the router.

    The base module is called as it is, quantised or not. Switched off, the result is the base module's, bit for bit.

    Args:
        base: the module adapted.
        pool: its adapters.
        target: its place in the model.
        switch: shared with the model's other routed modules.

    Attributes:
        folded: W + sum_z w_z scale_z B_z A_z for weights that never change, in the base weight's own layout; else None.
    """

    folded: Tensor | None

    def __init__(self, base: nn.Module, pool: ModulePool, target: TargetModule, switch: Switch) -> None:
        super().__init__()
        self.base = base
        self.pool = pool
        self.target = target
        self.switch = switch
        self.register_buffer("folded", None, persistent=False)

    def forward(self, u_BTI: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See the class."""
        switch = self.switch
        if not switch.enabled:
            result: Tensor = self.base(u_BTI, *args, **kwargs)
            return result
        call = switch.passing.call
        if call is None:
            raise ConfigError(
                f"{self.target.name} was called outside a forward pass of the routed model, where no expert can be "
                "chosen for it; call the model or its decoder (get_decoder()), or use disabled() for the base alone"
            )
        if self.folded is not None:
            weight = self.folded.T if isinstance(self.base, Conv1D) else self.folded
            return F.linear(u_BTI, weight, getattr(self.base, "bias", None))
        y_BTO: Tensor = self.base(u_BTI, *args, **kwargs)
        shape = u_BTI.shape
        u_tokens = u_BTI if u_BTI.dim() == 3 else u_BTI.reshape(call.mask_BT.shape[0], -1, shape[-1])
        delta = self.pool.delta(u_tokens, switch.route(self.target, u_tokens, call)).view(y_BTO.shape)
        if torch.is_grad_enabled() and (y_BTO.requires_grad or delta.requires_grad):
            return y_BTO + delta.to(y_BTO.dtype)
        return y_BTO.add_(delta.to(y_BTO.dtype))

    def __getattr__(self, name: str) -> Any:
        """What a base model reads of its own modules (`weight`, `in_features`) is the base module's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base" or name.startswith("__"):
                raise
            return getattr(self.base, name)

    def extra_repr(self) -> str:
        """The number of experts."""
        return f"experts={len(self.target.experts)}"

"""Switch one expert on for a while, and leave a model as it was found.

`adapted` adds an expert's branches to a model by forward hooks, `unchanged` undoes whatever is done to a model inside
it. Neither writes to a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weftlm.experts.expert import Gate, LoRAExpert, LoRAFactors
from weftlm.experts.lora import check_fits

_COMPUTE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes a weight can be multiplied in; any other holds a quantised weight."""


def low_rank(u_XI: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float, gate_X: Tensor | None = None) -> Tensor:
    """The branch of an adapter.

        y = s B A u          or, gated,          y = s B A (g u) = B (s g A u)

    A scalar gate commutes with A, so that it is applied to R numbers per token instead of I.

    Args:
        u_XI: module input, any leading axes X.
        A_RI: input factor.
        B_OR: output factor.
        scale: s.
        gate_X: g, one number per token.
    Returns:
        y_XO: in the factors' dtype, or autocast's.
    """
    h_XR = F.linear(u_XI.to(A_RI.dtype), A_RI)
    factor: Tensor | float = scale if gate_X is None else (scale * gate_X)[..., None].to(h_XR.dtype)
    return F.linear(h_XR * factor, B_OR)


def gate_values(u_XI: Tensor, v_I: Tensor) -> Tensor:
    """g = sigmoid(v . u) for every token, in float32 or wider whatever the precision around it.

    Args:
        u_XI: module input.
        v_I: gate vector.
    Returns:
        g_X.
    """
    wide = torch.promote_types(u_XI.dtype, torch.float32)
    with torch.autocast(u_XI.device.type, enabled=False):
        return torch.sigmoid(u_XI.to(wide) @ v_I.to(wide))


def placed(factors: LoRAFactors, module: nn.Module) -> tuple[Tensor, Tensor]:
    """A_RI and B_OR on a linear module's device, in the dtype it computes in.

    That is its weight's; a quantised module says its own (`compute_dtype`), or the factors stay float32.
    """
    weight = next(chain(module.parameters(), module.buffers()))
    dtype = weight.dtype if weight.dtype in _COMPUTE else getattr(module, "compute_dtype", None) or torch.float32
    return factors.A_RI.to(weight.device, dtype), factors.B_OR.to(weight.device, dtype)


@contextmanager
def adapted(model: nn.Module, expert: LoRAExpert, gate: Gate | None = None) -> Iterator[None]:
    """Run a model with one expert switched on.

        y = W u + s B A u          or, with a gate,          y = W u + s B A (sigmoid(v . u) u)

    in every module the expert adapts. The gated form is the one gates are trained in (Muqeeth et al. 2024,
    arXiv:2402.05859, section 3). Modules and weights stay as they are: the branch is added by forward hooks, and a
    model compiled in place runs uncompiled meanwhile.

    Args:
        model: the base model; other experts switched on around this one add up.
        expert: the adapter.
        gate: its gate; None runs the expert in full.
    Raises:
        ExpertError: the expert does not fit the model.
    """
    check_fits(expert, model)
    with ExitStack() as stack:
        stack.enter_context(eager(model))
        for name, factors in expert.modules.items():
            module = model.get_submodule(name)
            branch = _Branch(module, factors, None if gate is None else gate.vectors[name])
            stack.callback(module.register_forward_hook(branch, with_kwargs=True).remove)
        yield


class _Branch:
    """A forward hook that adds an expert's branch to a module's output."""

    def __init__(self, module: nn.Module, factors: LoRAFactors, v_I: Tensor | None) -> None:
        self.A_RI, self.B_OR = placed(factors, module)
        self.scale = factors.scale
        self.v_I = None if v_I is None else v_I.to(self.A_RI.device)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y_XO: Tensor) -> Tensor:
        u_XI = module_input(args, kwargs)
        gate_X = None if self.v_I is None else gate_values(u_XI, self.v_I)
        return y_XO + low_rank(u_XI, self.A_RI, self.B_OR, self.scale, gate_X).to(y_XO.dtype)


def module_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first argument of a linear module's call, as a hook sees it."""
    first: Tensor = args[0] if args else next(iter(kwargs.values()))
    return first


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Run modules compiled in place as if they were not: compiled code does not see hooks added later."""
    compiled = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, implementation in compiled:
            module._compiled_call_impl = implementation


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undo on the way out, also after an error, whatever happens to a model inside but writes to its weights.

    Put back are the modules themselves, hooks, buffers, attributes, training modes, `requires_grad` and devices. So
    wrapping layers (PEFT, gates), compiling and moving to an accelerator leave no trace.
    """
    modules = [(module, dict(module.__dict__), _tables(module)) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.device) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, attributes, tables in modules:
            for added in module.__dict__.keys() - attributes.keys():
                del module.__dict__[added]
            module.__dict__.update(attributes)
            for key, table in tables.items():
                held = module.__dict__[key]
                held.clear()
                held.update(table)
        for parameter, requires_grad, device in parameters:
            if parameter.device != device:
                parameter.data = parameter.data.to(device)
            parameter.requires_grad_(requires_grad)


def _tables(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """Copies of a module's own tables: submodules, parameters, buffers and hooks, each a dictionary."""
    held = module.__dict__.items()
    return {key: dict(value) for key, value in held if key.startswith("_") and isinstance(value, dict)}

"""Run a model with one expert for a while, as it is or with gates to train, and leave the model as it was.

`adapted` adds an expert's branches to a model by forward hooks, `gated` puts a trainable gate on each of them, and
`unchanged` undoes whatever is done to a model inside it. None of them writes to a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weftlm.experts.expert import LoRAExpert
from weftlm.experts.lora import check_fits
from weftlm.experts.low_rank import LowRank, gate_values, placement


@contextmanager
def adapted(model: nn.Module, expert: LoRAExpert) -> Iterator[None]:
    """Run a model with one expert switched on.

        y = W u + s B A u

    in every module the expert adapts. Modules and weights stay as they are: the branch is added by forward hooks, and a
    model compiled in place runs uncompiled meanwhile.

    Args:
        model: Base model; other experts switched on around this one add up.
        expert: Adapter.
    Raises:
        ExpertError: the expert does not fit the model.
    """
    check_fits(expert, model)
    with ExitStack() as stack:
        stack.enter_context(eager(model))
        for name, factors in expert.modules.items():
            module = model.get_submodule(name)
            branch = LowRank([factors], *placement(module))
            stack.callback(module.register_forward_hook(partial(add_branch, branch, None), with_kwargs=True).remove)
        yield


@contextmanager
def gated(model: nn.Module, expert: LoRAExpert) -> Iterator[dict[str, nn.Parameter]]:
    """Run a model with an expert and its untrained gates: what `train_gate`, or a loop of one's own, trains.

        y = W u + s B A (sigmoid(v . u) u)          v = 0 at first: every token gets half the adapter

    Everything but the gates is frozen meanwhile, and a model compiled in place runs uncompiled; afterwards the model is
    as it was, to the bit and to `requires_grad`. `train_gate` trains on next tokens or on examples. With any
    other loss a gate is trained so:

        with gated(model, expert) as vectors:
            optimizer = torch.optim.AdamW(vectors.values(), lr=5e-3, weight_decay=0.0)
            for batch in batches:                       # the expert's own data and loss
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(vectors.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            gate = Gate({name: plain(v_I) for name, v_I in vectors.items()}, facts={"steps": len(batches), "lr": 5e-3})

    Args:
        model: A transformer, encoder-decoders too.
        expert: The adapter.
    Returns:
        The gate vectors by module name, float32 parameters of the model.
    Raises:
        ExpertError: the expert does not fit the model.
    """
    check_fits(expert, model)
    with unchanged(model), eager(model):
        model.requires_grad_(False)
        vectors = {}
        for name, factors in expert.modules.items():
            module = model.get_submodule(name)
            branch = LowRank([factors], *placement(module))
            zeros_I = torch.zeros(factors.A_RI.shape[1], dtype=torch.float32, device=branch.A_ERI.device)
            branch.gate_v = vectors[name] = nn.Parameter(zeros_I)
            module.add_module("gated_branch", branch)  # moves with the model
            module.register_forward_hook(partial(add_branch, branch, vectors[name]), with_kwargs=True)
        yield vectors


def add_branch(
    branch: LowRank, v_I: Tensor | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y_XO: Tensor
) -> Tensor:
    """Forward hook that adds an expert's branch to a module's output, scaled by sigmoid(v . u) where there is a v."""
    u_XI = module_input(args, kwargs)
    return branch.add(y_XO, u_XI, gate_X=None if v_I is None else gate_values(u_XI, v_I))


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

"""Adapters folded into the weights of their base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from weftlm.errors import ConfigError
from weftlm.experts.expert import LoRAExpert
from weftlm.experts.lora import check_fits


def scaled(expert: LoRAExpert, weight: float) -> LoRAExpert:
    """The same adapter with a multiple of its update."""
    modules = {name: replace(each, scale=weight * each.scale) for name, each in expert.modules.items()}
    return replace(expert, modules=modules)


@torch.no_grad()
def fold(model: PreTrainedModel, experts: Sequence[LoRAExpert]) -> None:
    """Add the updates of adapters to a model's own weights.

        W <- W + sum over z of scale_z B_z A_z

    The outer products are added, not the factors, which would mix every B with every A. A weight that two modules share
    (tied embeddings) is copied first, so that the module that is not adapted keeps it.

    Raises:
        ConfigError: a weight is quantised and cannot take an update.
        ExpertError: an adapter does not fit the model.
    """
    for expert in experts:
        check_fits(expert, model)
    for name in dict.fromkeys(name for expert in experts for name in expert.modules):
        module = model.get_submodule(name)
        parts = [expert.modules[name] for expert in experts if name in expert.modules]
        updates = (each.scale * (each.B_OR.float() @ each.A_RI.float()) for each in parts)
        folded = folded_weight(module, sum(updates, start=torch.zeros(())))
        if folded is None:
            raise ConfigError(f"{name} is a quantised {type(module).__name__}; load the base in float to fold into it")
        weight = module.get_parameter("weight")
        if sum(weight is other for _, other in model.named_parameters(remove_duplicate=False)) > 1:
            module.weight = nn.Parameter(folded, requires_grad=weight.requires_grad)
            if module is model.get_output_embeddings():
                model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
        else:
            weight.copy_(folded)


def folded_weight(module: nn.Module, delta_OI: Tensor) -> Tensor | None:
    """W + delta, in the weight's own layout and dtype; None where a weight is quantised or of another shape."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear | Conv1D) or not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    delta = delta_OI.T if isinstance(module, Conv1D) else delta_OI
    if delta.shape != weight.shape:
        return None
    return (weight.detach().float() + delta.to(weight.device, torch.float32)).to(weight.dtype)

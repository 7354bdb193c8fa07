"""Several adapters as one, in factors; and an adapter folded into the weights of its base."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from weftlm.errors import ConfigError, ExpertError
from weftlm.experts.expert import BaseReference, LoRAExpert, LoRAFactors
from weftlm.experts.lora import check_fits, make_peft_config


def merge_experts(experts: Sequence[LoRAExpert], weights: Sequence[float] | None = None, *, name: str) -> LoRAExpert:
    """Average the updates of several adapters into one adapter, of the sum of their ranks.

        dW = sum over z of w_z scale_z B_z A_z = [w_1 scale_1 B_1, w_2 scale_2 B_2, ...] [A_1; A_2; ...]

    The outer products are averaged, not the factors: averaging A and B separately would mix every B with every A. A
    module an expert does not adapt contributes zero, and the weights stay as they are. The result's scale is 1.

    Args:
        experts: Adapters over one base.
        weights: w_z, one per expert; 1 / number of experts where None. They need not sum to 1.
        name: Name of the result.
    Raises:
        ConfigError: no experts, another number of weights, or weights that are not finite.
        ExpertError: the experts adapt different bases or disagree on a module's widths.
    """
    if not experts:
        raise ConfigError("there is nothing to merge; give at least one expert")
    if weights is None:
        weights = [1 / len(experts)] * len(experts)
    if len(weights) != len(experts) or not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(
            f"merge weights are {list(weights)}; need one finite number for each of {len(experts)} experts"
        )
    base = _common_base(experts)
    modules = {}
    for module in sorted({module for expert in experts for module in expert.modules}):
        parts = [(weight, expert) for weight, expert in zip(weights, experts, strict=True) if module in expert.modules]
        _check_widths(module, [expert for _, expert in parts])
        factors = [(weight, expert.modules[module]) for weight, expert in parts]
        A_RI = torch.cat([each.A_RI.double() for _, each in factors])
        B_OR = torch.cat([weight * each.scale * each.B_OR.double() for weight, each in factors], dim=1)
        modules[module] = LoRAFactors(A_RI.float(), B_OR.float(), 1.0)
    return LoRAExpert(name, base, modules, make_peft_config(base, modules, experts[0].peft_config))


@torch.no_grad()
def fold(model: PreTrainedModel, expert: LoRAExpert) -> None:
    """Add an adapter's updates to a model's own weights.

        W <- W + scale B A

    A weight that two modules share (tied embeddings) is copied first, so that the module that is not adapted keeps it.

    Raises:
        ConfigError: a weight is quantised and cannot take an update.
        ExpertError: the adapter does not fit the model.
    """
    check_fits(expert, model)
    for name, factors in expert.modules.items():
        module = model.get_submodule(name)
        delta_OI = factors.scale * (factors.B_OR.float() @ factors.A_RI.float())
        folded = folded_weight(module, delta_OI)
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


def _common_base(experts: Sequence[LoRAExpert]) -> BaseReference:
    """The base all experts adapt, with its fingerprint where one of them knows it."""
    known = [expert for expert in experts if expert.base.fingerprint is not None]
    for expert in known[1:]:
        if expert.base.fingerprint != known[0].base.fingerprint:
            raise ExpertError(
                f"experts {known[0].name!r} and {expert.name!r} adapt different bases ({known[0].base.name}, "
                f"{expert.base.name}); merge experts of one base"
            )
    return known[0].base if known else experts[0].base


def _check_widths(module: str, experts: Sequence[LoRAExpert]) -> None:
    first = experts[0].modules[module].widths
    for expert in experts[1:]:
        if (other := expert.modules[module].widths) != first:
            raise ExpertError(
                f"experts {experts[0].name!r} and {expert.name!r} disagree on {module}: {first[0]} to {first[1]}, "
                f"{other[0]} to {other[1]}; merge experts of one base"
            )

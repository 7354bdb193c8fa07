"""The direction v that alignments are measured along, and the few things every estimator does with a model.

A direction is a gradient held outside `.grad`: one tensor per trainable parameter, tied parameters once. It is taken
with `torch.autograd.grad`, so neither `.grad` nor the optimizer's state ever sees it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from weftlm.errors import ConfigError, NumericsError
from weftlm.evaluation.perplexity import evaluation_mode
from weftlm.models.hf import SequenceLosses
from weftlm.training.parallel import units

Direction = dict[str, Tensor]
"""v by parameter name: detached, float32 (float64 where the parameter is), each of its parameter's shape."""


def gradient_direction(
    model: nn.Module, losses: SequenceLosses, tokens_BT1: Tensor, *, micro_batch: int | None = None
) -> Direction:
    """The gradient of the mean loss over sequences, without dropout.

        v = grad_theta  (1 / B) sum_b L_b(theta)            B counts the sequences of all ranks

    Each rank brings sequences of its own (their number may differ, and be 0); all ranks get the same v. The training
    step around it is not disturbed: `.grad`, the optimizer and the modules' modes stay as they were.

    Args:
        model: the model, also wrapped in `DistributedDataParallel` or compiled; frozen parameters do not enter v.
        losses: see `SequenceLosses`.
        tokens_BT1: this rank's sequences.
        micro_batch: sequences per backward pass; None takes all at once.
    Raises:
        ConfigError: nothing is trainable, or no rank brought a sequence.
        NumericsError: the gradient is not finite.
    """
    direction, total = mean_gradient(model, losses, chunks(tokens_BT1, micro_batch))
    if total == 0:
        raise ConfigError("the direction is the gradient over 0 sequences; give at least one target sequence")
    if not math.isfinite(norm(direction.values())):
        raise NumericsError(
            f"the gradient of the mean loss over {total} sequences is not finite; lower the learning rate or look "
            f"for sequences whose loss is infinite"
        )
    return direction


def mean_gradient(model: nn.Module, losses: SequenceLosses, pieces: Sequence[Tensor]) -> tuple[Direction, int]:
    """The gradient of the mean loss over the sequences of all ranks, and their number; zero where there are none.

    Args:
        model: see `gradient_direction`.
        losses: see `SequenceLosses`.
        pieces: this rank's sequences, cut into passes.
    """
    module, parameters = unwrap(model), trainable_parameters(model)
    device, sharded = next(iter(parameters.values())).device, is_sharded(parameters.values())
    gradient = {name: torch.zeros_like(each, dtype=wide(each.dtype)) for name, each in parameters.items()}
    passes, scale = [(piece, 1) for piece in pieces], 1
    if sharded:
        # A pass gathers parameters from all ranks: one that has run out repeats a sequence that does not count.
        # Gradients arrive averaged over ranks: scale so that their average is the sum.
        most = torch.tensor(len(pieces), device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        spare = pieces[0][:1] if pieces else torch.zeros(1, 2, dtype=torch.int64, device=device)
        passes += [(spare, 0)] * (int(most) - len(pieces))
        scale = torch.distributed.get_world_size()
    with evaluation_mode(module):
        for piece, counts in passes:
            loss = losses(module, piece).sum() * (counts * scale)
            parts = _by_backward(loss, parameters.values()) if sharded else _apart(loss, parameters.values())
            for total, part in zip(gradient.values(), parts, strict=True):
                if part is not None:
                    total.add_(part)
    count = int(sum_over_ranks(torch.tensor(float(sum(map(len, pieces))), device=device)))
    for total in gradient.values():
        (total if sharded else sum_over_ranks(total)).div_(max(count, 1))
    return gradient, count


def _apart(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Iterable[Tensor | None]:
    return torch.autograd.grad(loss, list(parameters), allow_unused=True)


def _by_backward(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Iterable[Tensor | None]:
    """Gradients of a sharded model, which deposits them only in `.grad`: put aside what is there, and put it back."""
    held = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in held:
        parameter.grad = None
    try:
        loss.backward()
        return [parameter.grad for parameter, _ in held]
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient


def precondition(
    direction: Direction, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> Direction:
    """The direction as AdamW would scale it.

        u = v / (sqrt(vhat) + eps),       vhat = exp_avg_sq / (1 - beta2^t)            (Kingma & Ba 2015, alg. 1)

    With u in place of v, an alignment predicts the first-order effect of an Adam step rather than of a gradient step.

    Args:
        direction: v; not changed.
        optimizer: `torch.optim.AdamW` or `Adam` (also wrapped by accelerate) that has taken at least one step.
        parameters: the trainable parameters by the direction's names.
    Raises:
        ConfigError: a parameter along which v is not zero has no second moment yet, or is not in the optimizer.
    """
    settings = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    scaled: Direction = {}
    for name, part in direction.items():
        parameter = parameters[name]
        state = optimizer.state.get(parameter, {})
        if parameter not in settings or "exp_avg_sq" not in state:
            if norm([part]) == 0.0:
                scaled[name] = part.clone()
                continue
            raise ConfigError(
                f"precondition: adam needs the second moment of {name}, and the optimizer has none; use AdamW or Adam "
                f"and take at least one optimizer step first, or set precondition: none"
            )
        group = settings[parameter]
        second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
        correction = 1.0 - float(group["betas"][1]) ** float(state["step"])
        scaled[name] = part / ((second.to(part.dtype) / correction).sqrt() + float(group["eps"]))
    return scaled


# -- what every estimator does with a model ---------------------------------------------------------------------------


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel` and `torch.compile`, whose parameter names directions use."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name in the unwrapped model, tied ones once; sharded ones as shards.

    Raises:
        ConfigError: there are none.
    """
    reshard(model)
    found = {name: parameter for name, parameter in unwrap(model).named_parameters() if parameter.requires_grad}
    if not found:
        raise ConfigError("no parameter of the model requires a gradient, so no alignment can be measured")
    return found


def check_direction(direction: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Require one tensor of the right shape for each trainable parameter.

    Raises:
        ConfigError: names or shapes differ.
    """
    odd = sorted(set(direction) ^ set(parameters))
    odd += [name for name in parameters if name in direction and direction[name].shape != parameters[name].shape]
    if odd:
        raise ConfigError(
            f"the direction does not fit the model's trainable parameters at {', '.join(odd[:5])}"
            f"{' and more' if len(odd) > 5 else ''}; take it from this model with gradient_direction"
        )


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether parameters are split over ranks (FSDP2's fully_shard, tensor parallelism)."""
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 keeps gathered after a forward pass, so that the shards are the parameters again."""
    for unit in units(model):
        unit.reshard()


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, every narrower type becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dot(left: Iterable[Tensor], right: Iterable[Tensor]) -> Tensor:
    """<left, right> over all parameters: each parameter's product in its own precision, their sum in float64.

    Returns:
        a scalar on the parameters' device; nothing waits for the device until it is read.
    """
    parts: list[Tensor] = []
    for x, y in zip(left, right, strict=True):
        if isinstance(y, DTensor):
            parts.append((x.to(y.dtype) * y).sum().full_tensor())  # type: ignore[attr-defined]
        else:
            parts.append(torch.dot(x.reshape(-1).to(y.dtype), y.reshape(-1)))
    return high_precision(torch.stack(parts)).sum()


def norm(vector: Iterable[Tensor]) -> float:
    """Euclidean norm over all parameters."""
    parts = list(vector)
    return math.sqrt(float(dot(parts, parts)))


def high_precision(values: Tensor) -> Tensor:
    """float64, on the CPU where the device has no float64."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def chunks(tokens_BT1: Tensor, micro_batch: int | None) -> Sequence[Tensor]:
    """The sequences in runs of at most `micro_batch`, or all in one; no run at all where there are no sequences."""
    return tokens_BT1.split(micro_batch or len(tokens_BT1)) if len(tokens_BT1) else ()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over ranks in place and return it; without an initialised process group, leave it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values

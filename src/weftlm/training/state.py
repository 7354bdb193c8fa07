"""A model in training as plain tensors: its optimizer, what of both a checkpoint holds, and the folder it ends as.

Checkpoints hold whole tensors under the parameters' names, so none of them knows how many processes wrote it or how
these shared the model: any other number, sharded or not, continues from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from weftlm.errors import CheckpointError
from weftlm.training.config import TrainingConfig
from weftlm.training.parallel import gathered, put, units

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def adamw(parameters: Mapping[str, nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms and biases alone; of sharded parameters it holds this rank's part."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr, betas=config.betas, eps=config.eps, fused=True,
    )  # fmt: skip


def _weights(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Trained weights and persistent buffers, under the names they have in checkpoints."""
    kept = module.state_dict()
    held = {**parameters, **{name: buffer for name, buffer in module.named_buffers() if name in kept}}
    return {f"model.{name}": tensor for name, tensor in held.items()}


def dump_tensors(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    *,
    keep: bool = True,
) -> dict[str, Tensor]:
    """Trained weights, persistent buffers and optimizer moments under one flat set of names, whole, on the CPU.

    Args:
        module: the model.
        optimizer: Optimizer made by `adamw`.
        parameters: its trainable parameters. Where they are sharded every rank must call this.
        keep: False gives nothing, and only takes part in gathering.
    """
    moments = {
        f"optimizer.{key}.{name}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
    return gathered({**_weights(module, parameters), **moments}, keep=keep)


def load_tensors(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Undo `dump_tensors`; each rank takes its parts of what is sharded.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    wanted = _weights(module, parameters)
    if odd := sorted({name for name in tensors if name.startswith("model.")} ^ wanted.keys()):
        raise CheckpointError(f"the checkpoint is of another model: {odd[0]!r} and {len(odd) - 1} more do not match")
    for name, tensor in wanted.items():
        put(tensor, tensors[name])
    for name, parameter in parameters.items():
        stored = {key: tensors[at] for key in _MOMENTS if (at := f"optimizer.{key}.{name}") in tensors}
        if stored:
            optimizer.state[parameter] = {key: _beside(parameter, value) for key, value in stored.items()}


def _beside(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A copy of an optimizer's value on its parameter's device, split as the parameter is unless it is a number."""
    if value.ndim == 0:
        return value.to(parameter.device, copy=True)
    placed = torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
    put(placed, value)
    return placed


def save_model(module: nn.Module, folder: Path, *, writes: bool) -> None:
    """Write a plain Hugging Face model folder (an adapter alone, where one was trained).

    Args:
        module: the model. Where it is sharded every rank must call this.
        folder: where to.
        writes: whether this rank writes.
    """
    state = None
    if units(module):
        for unit in units(module):
            unit.reshard()
        state = gathered(module.state_dict(keep_vars=True), keep=writes)
    if writes:
        # PEFT would write the whole output head beside an adapter on it.
        options = {"save_embedding_layers": False} if hasattr(module, "peft_config") else {}
        module.save_pretrained(folder, state_dict=state, **options)  # type: ignore[operator]

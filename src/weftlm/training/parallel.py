"""Fully sharded training (FSDP2): each process holds its part of every parameter, gradient and optimizer moment.

A decoder layer is gathered from all processes while it computes and dropped afterwards. What the rest of the room does
with parameters it does on parts (DTensors); where one tensor is wanted whole, `whole` and `put` go between the two.
Parts are the contiguous pieces `torch.chunk` cuts the first axis into, so the last processes may hold less, or nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from weftlm.errors import ConfigError, reason

log = logging.getLogger(__name__)


def shard(
    module: nn.Module, *, device: torch.device, bf16: bool, compiled: bool = False, trained: bool = True
) -> nn.Module:
    """Split a model's parameters over the processes of the default group, in place, and move the parts to the device.

    Layers are units of their own, embeddings, head and what else there is are one more. No layer is on the device
    whole before it is used: the model may be larger than the device.

    Args:
        module: the model, on the CPU and the same on every process.
        device: where the parts live.
        bf16: gather and compute in bfloat16; parts, sums of gradients and optimizer stay in their own precision.
        compiled: compile each layer, with its gathering left out of the compiled part.
        trained: False also drops the last unit after each forward pass, since no backward pass will want it.
    Returns:
        the same module.
    Raises:
        ConfigError: the model cannot be split.
    """
    coarse = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = coarse if bf16 else MixedPrecisionPolicy()
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    layers = decoder_layers(module)
    if not layers:
        log.warning(
            "%s does not name its layers (_no_split_modules): it is gathered whole for every pass, and only gradients "
            "and optimizer state are split", type(module).__name__,
        )  # fmt: skip
    try:
        for layer in layers:
            if compiled:
                layer.compile()
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=None if trained else True)
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise ConfigError(
            f"training.parallel: fsdp2 cannot split a {type(module).__name__}: {reason(error)}; use parallel: ddp"
        ) from error
    # Buffers for gathering are made at the first use. Made under inference mode they could never be trained through.
    for unit in units(module):
        unit.unshard()
        unit.reshard()
    return module


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """The modules a Hugging Face model calls indivisible (its layers), outermost ones only, in order."""
    kinds = {kind for part in module.modules() for kind in getattr(part, "_no_split_modules", None) or ()}
    found: list[nn.Module] = []
    inside: set[int] = set()
    for part in module.modules():
        if type(part).__name__ in kinds and id(part) not in inside and part is not module:
            found.append(part)
            inside.update(id(inner) for inner in part.modules())
    return found


def units(module: nn.Module) -> list[FSDPModule]:
    """The parts of a sharded model that are gathered together; none where it is not sharded."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts; every process must ask for it. What is not split comes back as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()
    return gathered


def put(into: Tensor, value: Tensor) -> None:
    """Copy a whole tensor's values into a tensor of which this process may hold only a part; nothing is sent."""
    with torch.no_grad():
        if isinstance(into, DTensor):
            value = distribute_tensor(value.to(into.device), into.device_mesh, into.placements, src_data_rank=None)
        into.copy_(value)


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Named tensors whole, on the CPU; every process must ask, those with `keep` get them.

    A process that does not keep them holds one tensor at a time. Tied weights stay tied.
    """
    found: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in known:
            full = whole(tensor.detach())
            known[id(tensor)] = full.cpu() if keep else full.new_empty(0)
        found[name] = known[id(tensor)]
    return found if keep else {}

"""Gates, fits and scores on disk: one safetensors file each, whole or not there, and a reader that trusts nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from weftlm.errors import CheckpointError, reason
from weftlm.files import checksum, parse_json, room, whole

_KEY, _DIGEST = "weftlm", "digest"


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON facts as one safetensors file; the path holds the old file or the new one, never a half.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    described = parse_json(json.dumps({"kind": kind, "format": 1, **facts}))
    data = save(plain, metadata={_KEY: json.dumps({**described, _DIGEST: _digest(plain, described)})})
    try:
        with room(path.parent, len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path, sync=True) as temporary:
                temporary.write_bytes(data)
    except OSError as error:
        raise CheckpointError(
            f"{kind} cannot be written to {path}: {reason(error)}; check space and permission"
        ) from error


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote.

    Raises:
        CheckpointError: the file is missing, torn or altered, or holds something else.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = parse_json((file.metadata() or {}).get(_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is missing, torn or not safetensors: {reason(error)}") from error
    found = (facts.get("kind"), facts.get("format")) if isinstance(facts, dict) else (None, None)
    if found != (kind, 1):
        raise CheckpointError(f"{path} holds {found[0] or 'something else'} in format {found[1]}; expected {kind} in 1")
    stated = facts.pop(_DIGEST, None)
    if stated is not None and stated != _digest(tensors, facts):
        raise CheckpointError(f"{path} was altered since it was written (its digest differs)")
    return tensors, facts


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """BLAKE2b-128 of facts and tensors, by name."""
    digest = hashlib.blake2b(checksum(facts).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""What travels with an adapter: its gate and its statistics, checked against it and written as safetensors.

`gate.safetensors` holds v_I under each module's name; `statistics.safetensors` holds `means.MODULE`, `embeddings`,
`token_counts` and `bigram_counts`. The rest is JSON under the metadata key `weftlm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from weftlm.errors import ExpertError
from weftlm.experts.expert import Gate, LoRAExpert, Statistics
from weftlm.experts.files import GATE, METADATA, STATISTICS, parse_metadata, parse_tensors, to_json
from weftlm.files import parse_json

UNIT_TOLERANCE = 1e-3
"""How far the length of an embedding may be from 1."""
MAX_VECTOR_NORM = 1e9
"""Largest length of a gate's vector or a mean input; activations in half precision stay far below, and squares of what
is much longer overflow, so that one expert would turn everybody's scores into NaN."""

_MEANS = "means."
_SHOWN = 3


def check_gate(lora: LoRAExpert, gate: Gate) -> None:
    """Check that a gate has one sound vector for each module of an adapter, as wide as the module's input.

    Raises:
        ExpertError: a vector is missing, one too many, of another width, NaN, infinite or longer than
            `MAX_VECTOR_NORM`.
    """
    _check_vectors(lora, gate.vectors, "gate", "train the gate again on this adapter")


def check_statistics(lora: LoRAExpert, statistics: Statistics) -> None:
    """Check an expert's statistics: means as a gate's vectors, unit-length embeddings, counts that are not negative.

    Raises:
        ExpertError: one of them is not so.
    """
    cure = "compute the statistics again for this adapter"
    _check_vectors(lora, statistics.means, "statistics", cure)
    where = f"expert {lora.name!r}: statistics"
    embeddings_NF = statistics.embeddings_NF
    if embeddings_NF.ndim != 2:
        raise ExpertError(f"{where}: embeddings are {tuple(embeddings_NF.shape)}; must be inputs x width; {cure}")
    lengths_N = embeddings_NF.double().norm(dim=1)
    if not ((lengths_N - 1).abs() <= UNIT_TOLERANCE).all():
        raise ExpertError(
            f"{where}: embeddings have lengths from {lengths_N.min():.4g} to {lengths_N.max():.4g}; each must be "
            f"1 ± {UNIT_TOLERANCE:g}; {cure}"
        )
    for what, counts in (("token", statistics.token_counts_V), ("bigram", statistics.bigram_counts_K)):
        if counts.ndim != 1 or not torch.isfinite(counts).all() or (counts < 0).any():
            raise ExpertError(f"{where}: {what} counts must be a row of finite numbers, none below 0; {cure}")


def encode_gate(lora: LoRAExpert, gate: Gate) -> bytes:
    """A gate as the contents of `gate.safetensors`; equal gates give equal bytes.

    Raises:
        ExpertError: the gate does not fit the adapter, or its facts are not JSON.
    """
    check_gate(lora, gate)
    metadata = to_json(lora.name, "the gate's facts", {"facts": dict(gate.facts)})
    return save({module: _plain(vector) for module, vector in gate.vectors.items()}, {METADATA: metadata})


def decode_gate(lora: LoRAExpert, data: bytes) -> Gate:
    """The gate in the contents of `gate.safetensors`.

    Raises:
        ExpertError: the file is broken, or the gate does not fit the adapter.
    """
    gate = Gate(_floats(parse_tensors(lora.name, GATE, data)), _described(lora.name, GATE, data)["facts"])
    check_gate(lora, gate)
    return gate


def encode_statistics(lora: LoRAExpert, statistics: Statistics) -> bytes:
    """Statistics as the contents of `statistics.safetensors`; equal statistics give equal bytes.

    Raises:
        ExpertError: they do not fit the adapter, or their facts are not JSON.
    """
    check_statistics(lora, statistics)
    tensors = {f"{_MEANS}{module}": _plain(mean) for module, mean in statistics.means.items()}
    tensors["embeddings"] = _plain(statistics.embeddings_NF)
    tensors["token_counts"] = _plain(statistics.token_counts_V)
    tensors["bigram_counts"] = _plain(statistics.bigram_counts_K)
    described = {"facts": dict(statistics.facts), "embedder": statistics.embedder}
    return save(tensors, {METADATA: to_json(lora.name, "the statistics' facts", described)})


def decode_statistics(lora: LoRAExpert, data: bytes) -> Statistics:
    """The statistics in the contents of `statistics.safetensors`.

    Raises:
        ExpertError: the file is broken, or the statistics do not fit the adapter.
    """
    tensors = _floats(parse_tensors(lora.name, STATISTICS, data))
    described = _described(lora.name, STATISTICS, data)
    means = {key.removeprefix(_MEANS): tensors.pop(key) for key in sorted(tensors) if key.startswith(_MEANS)}
    if set(tensors) != {"embeddings", "token_counts", "bigram_counts"}:
        raise ExpertError(
            f"expert {lora.name!r}: {STATISTICS} holds {', '.join(sorted(tensors)) or 'only means'}; it must hold "
            f"embeddings, token_counts and bigram_counts: compute the statistics again"
        )
    statistics = Statistics(
        means=means,
        embeddings_NF=tensors["embeddings"],
        embedder=str(described.get("embedder", "")),
        token_counts_V=tensors["token_counts"],
        bigram_counts_K=tensors["bigram_counts"],
        facts=described["facts"],
    )
    check_statistics(lora, statistics)
    return statistics


def _check_vectors(lora: LoRAExpert, vectors: Mapping[str, Tensor], what: str, cure: str) -> None:
    where = f"expert {lora.name!r}: {what}"
    lacking, extra = sorted(set(lora.modules) - set(vectors)), sorted(set(vectors) - set(lora.modules))
    if lacking or extra:
        listed = [f"nothing for {module}" for module in lacking] + [f"{module} is not adapted" for module in extra]
        more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        raise ExpertError(
            f"{where}: one vector per adapted module is needed: {'; '.join(listed[:_SHOWN])}{more}; {cure}"
        )
    for module, vector in vectors.items():
        width = int(lora.modules[module].A_RI.shape[1])
        if tuple(vector.shape) != (width,):
            raise ExpertError(
                f"{where}: the vector of {module} is {tuple(vector.shape)}; it must be ({width},); {cure}"
            )
        if not torch.isfinite(vector).all():
            raise ExpertError(f"{where}: the vector of {module} holds NaN or infinite values; {cure}")
        norm = float(vector.double().norm())
        if norm > MAX_VECTOR_NORM:
            raise ExpertError(
                f"{where}: the vector of {module} has a norm of {norm:.3g}, more than {MAX_VECTOR_NORM:g}; {cure}"
            )


def _described(name: str, file: str, data: bytes) -> dict[str, Any]:
    """The JSON of the metadata, whose `facts` are a mapping."""
    try:
        described = parse_json(parse_metadata(data)[METADATA].encode())
        if isinstance(described, dict) and isinstance(described["facts"], dict):
            return described
    except (KeyError, ValueError):
        pass
    raise ExpertError(f"expert {name!r}: {file} does not say what it holds (metadata {METADATA!r}); make it again")


def _floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: _plain(tensor) for key, tensor in tensors.items()}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()

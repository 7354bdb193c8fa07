"""What goes with an adapter: its gate and its statistics, checked against it and written as safetensors.

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
from weftlm.experts.expert import Gate, LoRAExpert, Statistics, plain
from weftlm.experts.files import GATE, METADATA, STATISTICS, parse_metadata, parse_tensors, to_json
from weftlm.files import parse_json

UNIT_TOLERANCE = 1e-3
"""Largest distance of the length of an embedding from 1."""
MAX_VECTOR_NORM = 1e9
"""Largest length of a gate's vector or a mean input; activations in half precision stay far below, and squares of what
is much longer overflow, so that one expert would turn all scores into NaN."""

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
    return _encode(lora.name, "the gate's facts", gate.vectors, {"facts": dict(gate.facts)})


def decode_gate(lora: LoRAExpert, data: bytes) -> Gate:
    """The gate in the contents of `gate.safetensors`.

    Raises:
        ExpertError: the file is broken, or the gate does not fit the adapter.
    """
    vectors, facts, _ = _decode(lora.name, GATE, data)
    gate = Gate(vectors, facts)
    check_gate(lora, gate)
    return gate


def encode_statistics(lora: LoRAExpert, statistics: Statistics) -> bytes:
    """Statistics as the contents of `statistics.safetensors`; equal statistics give equal bytes.

    Raises:
        ExpertError: they do not fit the adapter, or their facts are not JSON.
    """
    check_statistics(lora, statistics)
    tensors = {f"{_MEANS}{module}": mean for module, mean in statistics.means.items()}
    tensors["embeddings"] = statistics.embeddings_NF
    tensors["token_counts"] = statistics.token_counts_V
    tensors["bigram_counts"] = statistics.bigram_counts_K
    described = {"facts": dict(statistics.facts), "embedder": statistics.embedder}
    return _encode(lora.name, "the statistics' facts", tensors, described)


def decode_statistics(lora: LoRAExpert, data: bytes) -> Statistics:
    """The statistics in the contents of `statistics.safetensors`.

    Raises:
        ExpertError: the file is broken, or the statistics do not fit the adapter.
    """
    tensors, facts, described = _decode(lora.name, STATISTICS, data)
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
        facts=facts,
    )
    check_statistics(lora, statistics)
    return statistics


def _check_vectors(lora: LoRAExpert, vectors: Mapping[str, Tensor], what: str, cure: str) -> None:
    where = f"expert {lora.name!r}: {what}"
    listed = [f"nothing for {module}" for module in sorted(lora.modules.keys() - vectors.keys())]
    listed += [f"{module} is not adapted" for module in sorted(vectors.keys() - lora.modules.keys())]
    if listed:
        more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        raise ExpertError(
            f"{where}: one vector per adapted module is needed: {'; '.join(listed[:_SHOWN])}{more}; {cure}"
        )
    for module, vector in vectors.items():
        width, norm = int(lora.modules[module].A_RI.shape[1]), float(vector.double().norm())
        wrong = None
        if tuple(vector.shape) != (width,):
            wrong = f"is {tuple(vector.shape)}; it must be ({width},)"
        elif not torch.isfinite(vector).all():
            wrong = "holds NaN or infinite values"
        elif norm > MAX_VECTOR_NORM:
            wrong = f"has a norm of {norm:.3g}, more than {MAX_VECTOR_NORM:g}"
        if wrong is not None:
            raise ExpertError(f"{where}: the vector of {module} {wrong}; {cure}")


def _encode(name: str, what: str, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> bytes:
    return save({key: plain(tensor) for key, tensor in tensors.items()}, {METADATA: to_json(name, what, described)})


def _decode(name: str, file: str, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, facts, and all of the metadata's JSON."""
    tensors = {key: plain(tensor) for key, tensor in parse_tensors(name, file, data).items()}
    try:
        described = parse_json(parse_metadata(data)[METADATA].encode())
        if isinstance(described, dict) and isinstance(described["facts"], dict):
            return tensors, described["facts"], described
    except (KeyError, ValueError):
        pass
    raise ExpertError(f"expert {name!r}: {file} does not say what it holds (metadata {METADATA!r}); make it again")

"""The files of an expert: from an expert to contents that are equal for equal experts, and back, trusting nothing.

`adapter_model.safetensors` and `adapter_config.json` are in PEFT's format (`lora.py`). `gate.safetensors` holds v_I
under each module's name; `statistics.safetensors` holds `means.MODULE`, `embeddings`, `token_counts` and
`bigram_counts`. Their other facts are JSON under the metadata key `weftlm`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from weftlm.errors import ExpertError, reason
from weftlm.experts.expert import (
    CARD,
    CONFIG,
    GATE,
    STATISTICS,
    WEIGHTS,
    BaseReference,
    Expert,
    Gate,
    LoRAExpert,
    Statistics,
    plain,
)
from weftlm.experts.lora import about, lora_files, parse_lora, parse_tensors, some
from weftlm.files import parse_json

UNIT_TOLERANCE = 1e-3
"""Largest distance of the length of an embedding from 1."""
MAX_VECTOR_NORM = 1e9
"""Largest length of a gate's vector or a mean input; activations in half precision stay far below, and squares of what
is much longer overflow, so that one expert would turn all scores into NaN."""

_METADATA = "weftlm"
_MEANS = "means."
_OTHERS = ("embeddings", "token_counts", "bigram_counts")


def encode(expert: Expert) -> dict[str, bytes]:
    """The contents of an expert's files by name.

    Raises:
        ExpertError: the expert is not sound, or its card or facts are not JSON.
    """
    lora, gate, statistics = expert.lora, expert.gate, expert.statistics
    files = lora_files(lora)
    files[CARD] = (_to_json(lora, "its card", expert.card) + "\n").encode()
    if gate is not None:
        check_gate(lora, gate)
        files[GATE] = _pack(lora, gate.vectors, {"facts": dict(gate.facts)})
    if statistics is not None:
        check_statistics(lora, statistics)
        tensors = {f"{_MEANS}{module}": mean_I for module, mean_I in statistics.means.items()}
        others = (statistics.embeddings_NF, statistics.token_counts_V, statistics.bigram_counts_K)
        tensors |= dict(zip(_OTHERS, others, strict=True))
        files[STATISTICS] = _pack(lora, tensors, {"facts": dict(statistics.facts), "embedder": statistics.embedder})
    return files


def decode(name: str, files: Mapping[str, bytes], base: BaseReference, card: Mapping[str, Any]) -> Expert:
    """The expert in the contents of its files.

    Raises:
        ExpertError: a file is broken, the adapter is unsound, or gate or statistics do not fit it.
    """
    lora = replace(parse_lora(name, files[CONFIG], files[WEIGHTS]), base=base)
    gate: Gate | None = None
    statistics: Statistics | None = None
    if GATE in files:
        vectors, described = _unpack(name, GATE, files[GATE])
        gate = Gate(vectors, described["facts"])
        check_gate(lora, gate)
    if STATISTICS in files:
        tensors, described = _unpack(name, STATISTICS, files[STATISTICS])
        means = {key.removeprefix(_MEANS): tensors.pop(key) for key in sorted(tensors) if key.startswith(_MEANS)}
        if set(tensors) != set(_OTHERS):
            raise ExpertError(
                f"expert {name!r}: {STATISTICS} holds {', '.join(sorted(tensors)) or 'only means'}; it must hold "
                f"embeddings, token_counts and bigram_counts: compute the statistics again"
            )
        embeddings_NF, token_counts_V, bigram_counts_K = (tensors[key] for key in _OTHERS)
        embedder = str(described.get("embedder", ""))
        statistics = Statistics(means, embeddings_NF, embedder, token_counts_V, bigram_counts_K, described["facts"])
        check_statistics(lora, statistics)
    return Expert(lora, gate, statistics, card)


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


def _check_vectors(lora: LoRAExpert, vectors: Mapping[str, Tensor], what: str, cure: str) -> None:
    where = f"expert {lora.name!r}: {what}"
    listed = [f"nothing for {module}" for module in sorted(lora.modules.keys() - vectors.keys())]
    listed += [f"{module} is not adapted" for module in sorted(vectors.keys() - lora.modules.keys())]
    if listed:
        raise ExpertError(f"{where}: one vector per adapted module is needed: {some(listed, '; ')}; {cure}")
    for module, vector in vectors.items():
        width, norm = lora.modules[module].widths[0], float(vector.double().norm())
        wrong = None
        if tuple(vector.shape) != (width,):
            wrong = f"is {tuple(vector.shape)}; it must be ({width},)"
        elif not torch.isfinite(vector).all():
            wrong = "holds NaN or infinite values"
        elif norm > MAX_VECTOR_NORM:
            wrong = f"has a norm of {norm:.3g}, more than {MAX_VECTOR_NORM:g}"
        if wrong is not None:
            raise ExpertError(f"{where}: the vector of {module} {wrong}; {cure}")


def _to_json(lora: LoRAExpert, what: str, value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(value), indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ExpertError(
            f"expert {lora.name!r}: {what} must hold JSON values (text, finite numbers, lists, mappings): "
            f"{reason(error)}"
        ) from error


def _pack(lora: LoRAExpert, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> bytes:
    metadata = {_METADATA: _to_json(lora, "facts", described)}
    return save({key: plain(tensor) for key, tensor in tensors.items()}, metadata)


def _unpack(name: str, file: str, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, and the JSON object of its metadata, in which `facts` is an object."""
    with about(name):
        tensors = {key: plain(tensor) for key, tensor in parse_tensors(file, data).items()}
    try:
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        described = parse_json(header["__metadata__"][_METADATA])
        if isinstance(described, dict) and isinstance(described["facts"], dict):
            return tensors, described
    except (KeyError, TypeError, ValueError):
        pass
    raise ExpertError(f"expert {name!r}: {file} does not say what it holds (metadata {_METADATA!r}); make it again")

"""The types of an expert: a LoRA adapter, its gate, statistics of its data, and a card.

All tensors are float32 on the CPU, whatever the files hold.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "card.json"
GATE, STATISTICS = "gate.safetensors", "statistics.safetensors"
"""Names of an expert's files."""


def plain(tensor: Tensor, *, copy: bool = False) -> Tensor:
    """A tensor as experts hold and write it: float32, on the CPU, contiguous."""
    import torch  # noqa: PLC0415 - listing a library needs none

    return tensor.detach().to("cpu", torch.float32, copy=copy).contiguous()


@dataclass(frozen=True)
class LoRAFactors:
    """The adapter of one linear module.

        y = W u + scale * B (A u)

    Attributes:
        A_RI: input factor, rank x input width.
        B_OR: output factor, output width x rank.
        scale: alpha / rank, or alpha / sqrt(rank) for rslora.
    """

    A_RI: Tensor
    B_OR: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """R."""
        return int(self.A_RI.shape[0])

    @property
    def widths(self) -> tuple[int, int]:
        """I and O."""
        return int(self.A_RI.shape[1]), int(self.B_OR.shape[0])


@dataclass(frozen=True)
class BaseReference:
    """Which base model an expert adapts.

    Attributes:
        name: local folder or hub name, as PEFT's `base_model_name_or_path`.
        revision: hub revision, or None.
        fingerprint: `base_fingerprint` of the base; None where it is unknown.
    """

    name: str
    revision: str | None = None
    fingerprint: str | None = None

    def __str__(self) -> str:
        return (self.name or "unnamed") + ("" if self.revision is None else f" (revision {self.revision})")


def is_folder(name: str) -> bool:
    """Whether a text names an existing folder."""
    return "\0" not in name and bool(name) and os.path.isdir(name)


def base_name(name: str) -> str:
    """Canonical reference to a base model: hub id or absolute path."""
    return str(Path(name).resolve()) if is_folder(name) else name


def same_base(one: BaseReference, other: BaseReference) -> bool:
    """Whether two references name one place; a revision counts where both give one."""
    revisions = {one.revision, other.revision} - {None}
    return base_name(one.name) == base_name(other.name) and len(revisions) < 2


def base_problem(found: BaseReference, wanted: BaseReference) -> str | None:
    """How a base differs from that of a library, by fingerprints where both have one, else by name and revision.

    Returns:
        The rest of a sentence about the one found; None where they are the same.
    """
    if found.fingerprint is not None and wanted.fingerprint is not None:
        if found.fingerprint == wanted.fingerprint:
            return None
        return (
            f"is of another base than the library: {found.name or 'unnamed'} ({found.fingerprint}), not {wanted.name} "
            f"({wanted.fingerprint})"
        )
    if same_base(found, wanted):
        return None
    named = f"names the base {found}" if found.name else "does not name its base"
    return f"{named}, the library is for {wanted}, and there are no fingerprints to compare"


@dataclass(frozen=True)
class LoRAExpert:
    """An adapter over a base model.

    Attributes:
        name: unique in a library; letters, digits, `.`, `_`, `-` and `%` (`weftlm.corpora.labels.folder_name`).
        base: the model it adapts.
        modules: adapter by the base model's own module name (`model.layers.0.self_attn.q_proj`).
        peft_config: PEFT's adapter_config.json as read or as it will be written.
    """

    name: str
    base: BaseReference
    modules: Mapping[str, LoRAFactors]
    peft_config: Mapping[str, Any] = field(repr=False)

    @property
    def num_parameters(self) -> int:
        """Number of values in all factors."""
        return sum(each.A_RI.numel() + each.B_OR.numel() for each in self.modules.values())


@dataclass(frozen=True)
class Gate:
    """A post-hoc gate: one vector per adapted module (Muqeeth et al. 2024, arXiv:2402.05859).

    Attributes:
        vectors: v_I by module name, width of the module's input.
        facts: how it was trained: steps, learning rate, tokens, data fingerprint, seed.
    """

    vectors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Statistics:
    """Statistics of an expert's own data, for routers that need no gate; computed without any other expert's data.

    Attributes:
        means: mean over examples of the mean module input (base model with this expert switched on), v_I by module.
        embeddings_NF: unit-length embeddings of N training inputs, for retrieval.
        embedder: Name of their embedder ("tokens-1024"), for queries.
        token_counts_V: how often each token id occurs in the sampled training tokens.
        bigram_counts_K: counts of hashed (previous, next) token pairs, K buckets (`bigram_bucket`).
        facts: examples, tokens, data fingerprint, seed.
    """

    means: Mapping[str, Tensor]
    embeddings_NF: Tensor
    embedder: str
    token_counts_V: Tensor
    bigram_counts_K: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Expert:
    """An entry of a library: the adapter and what came with it.

    Attributes:
        lora: the adapter.
        gate: its gate, or None: then only routers that need none can use it.
        statistics: Statistics of its data, or None.
        card: base and revision, data fingerprint, training settings, metrics; JSON values.
    """

    lora: LoRAExpert
    gate: Gate | None = None
    statistics: Statistics | None = None
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.lora.name

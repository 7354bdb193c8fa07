"""Choosing documents by their own digest: held-out splits, samples and caps that do not depend on order.

Every document has a position: a uniform 64-bit hash of its digest under a seed. A choice of n documents takes the n
lowest positions, so it is the same however the corpus is ordered, sharded or read, and smaller choices are contained in
larger ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from weftlm.config import Section


def positions(digests: Sequence[bytes], seed: int, purpose: str) -> NDArray[np.uint64]:
    """Position of every document in the order of one choice, uniform in [0, 2^64).

    Args:
        digests: `Document.digest()` of each.
        seed: Random seed of the choice.
        purpose: Name of the choice; different purposes are independent.
    """
    key = f"{purpose}:{seed}".encode()
    key = key if len(key) <= 64 else hashlib.blake2b(key).digest()
    hashed = b"".join(hashlib.blake2b(digest, digest_size=8, key=key).digest() for digest in digests)
    return np.frombuffer(hashed, ">u8").astype(np.uint64)


def first_within(
    position_N: NDArray[np.uint64],
    group_N: NDArray[np.int64],
    limit_G: ArrayLike,
    size_N: NDArray[np.int64] | None = None,
) -> NDArray[np.bool_]:
    """Which documents of each group fill its limit, in order of position.

        chosen_n = [sum of size_m over m of n's group with position_m < position_n] < limit of n's group

    Args:
        position_N: Positions, all different.
        group_N: Number of each document's group.
        limit_G: Limit of each group, or one for all; the last document chosen may exceed it.
        size_N: Size of each document; absent: 1, so that limits are numbers of documents.
    """
    order_N = np.lexsort((position_N, group_N))
    grouped_N = group_N[order_N]
    sizes_N = np.ones(len(order_N), np.int64) if size_N is None else size_N[order_N]
    before_N = np.cumsum(sizes_N) - sizes_N
    before_N -= before_N[np.searchsorted(grouped_N, grouped_N)]
    limits = np.asarray(limit_G)
    chosen_N = np.empty(len(order_N), bool)
    chosen_N[order_N] = before_N < (limits if limits.ndim == 0 else limits[grouped_N])
    return chosen_N


class SplitConfig(Section):
    """How many documents of each domain are held out.

    Attributes:
        fraction: Share of a domain's documents.
        min_documents: Least number, where the domain has more documents than that.
        max_documents: Largest number.
    """

    fraction: float = Field(default=0.05, ge=0.0, lt=1.0)
    min_documents: int = Field(default=2, ge=0)
    max_documents: int = Field(default=1000, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> SplitConfig:
        if self.min_documents > self.max_documents:
            raise ValueError(f"min_documents {self.min_documents} exceeds max_documents {self.max_documents}")
        return self

    @property
    def holds_out(self) -> bool:
        """Whether any document can be held out."""
        return self.max_documents > 0 and (self.fraction > 0 or self.min_documents > 0)


def heldout_count(documents: int, config: SplitConfig) -> int:
    """How many of a domain's documents are held out; at least one is always left for training.

        n = min(max(round(fraction * documents), min_documents), max_documents, documents - 1)

    With `fraction: 0` nothing is held out.
    """
    if config.fraction == 0.0 or documents == 0:
        return 0
    return min(max(round(config.fraction * documents), config.min_documents), config.max_documents, documents - 1)

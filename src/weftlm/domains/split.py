"""Choosing documents by their own digest: held-out splits, samples and caps that do not depend on order.

Every document has a position: a uniform 64-bit hash of its digest under a seed. A choice of n documents takes the n
lowest positions, so it is the same however the corpus is ordered, sharded or read, and smaller choices are contained in
larger ones. Everything is streaming: memory is bounded by what is chosen, never by the corpus.
"""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass, field

from pydantic import Field, model_validator

from weftlm.config import Section

ALL = 1 << 64
"""A threshold above every position."""


def position(digest: bytes, seed: int, purpose: str) -> int:
    """Position of a document in the order of one choice, uniform in [0, 2^64).

    Args:
        digest: `Document.digest()`.
        seed: Random seed of the choice.
        purpose: Name of the choice; different purposes are independent.
    """
    key = f"{purpose}:{seed}".encode()
    key = key if len(key) <= 64 else hashlib.blake2b(key).digest()
    return int.from_bytes(hashlib.blake2b(digest, digest_size=8, key=key).digest(), "big")


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


@dataclass
class Lowest:
    """The threshold below which the `count` lowest of the positions seen are; `seen` counts all."""

    count: int
    seen: int = 0
    _kept: list[int] = field(default_factory=list)

    def add(self, place: int) -> None:
        """Take note of one position."""
        self.seen += 1
        if len(self._kept) < self.count:
            heapq.heappush(self._kept, -place)
        elif self._kept and place < -self._kept[0]:
            heapq.heapreplace(self._kept, -place)

    def threshold(self, count: int | None = None) -> int:
        """Positions below this are the `count` lowest (all that were kept, if None); count is at most `self.count`."""
        kept = sorted(-place for place in self._kept)
        count = len(kept) if count is None else min(count, len(kept))
        return kept[count - 1] + 1 if count else 0


@dataclass
class Budget:
    """The threshold below which the documents are whose sizes fill a budget, in order of position.

    The last document may exceed the budget: sizes below the threshold sum to at least `limit` where there is as much;
    `total` is that sum.
    """

    limit: int
    total: int = 0
    dropped: bool = False
    _kept: list[tuple[int, int]] = field(default_factory=list)

    def add(self, place: int, size: int) -> None:
        """Take note of one document of a size."""
        heapq.heappush(self._kept, (-place, size))
        self.total += size
        while self._kept and self.total - self._kept[0][1] >= self.limit:
            self.total -= heapq.heappop(self._kept)[1]
            self.dropped = True

    def threshold(self) -> int:
        """Positions below this fill the budget; `ALL` where everything fits."""
        if not self.dropped:
            return ALL
        return -self._kept[0][0] + 1 if self._kept else 0


class HeldoutPlan:
    """Which documents of each domain are held out: observe every document, then ask.

    Memory: at most `max_documents` numbers per domain.
    """

    def __init__(self, config: SplitConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._domains: dict[str, Lowest] = {}
        self._thresholds: dict[str, int] = {}

    def observe(self, domain: str, digest: bytes) -> None:
        """Count one document; each document of the corpus once."""
        kept = self._domains.get(domain)
        if kept is None:
            kept = self._domains[domain] = Lowest(self._config.max_documents)
        kept.add(position(digest, self._seed, "heldout"))
        self._thresholds.pop(domain, None)

    def documents(self) -> dict[str, int]:
        """Documents observed, by domain."""
        return {name: kept.seen for name, kept in self._domains.items()}

    def is_heldout(self, domain: str, digest: bytes) -> bool:
        """Whether a document is held out, given all that was observed."""
        threshold = self._thresholds.get(domain)
        if threshold is None:
            kept = self._domains[domain]
            threshold = self._thresholds[domain] = kept.threshold(heldout_count(kept.seen, self._config))
        return position(digest, self._seed, "heldout") < threshold

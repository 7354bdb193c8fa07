"""Exact duplicates are dropped, and kept in the first of several sets."""

from __future__ import annotations

from collections import Counter
from typing import Any

from weftlm.corpora.source import Document

_KEPT_EXAMPLES = 5


class SeenDocuments:
    """Which documents have been seen, and by which set first, in about 150 bytes of memory per document.

    Fill the sets in order of priority: what the target has is then missing from the held-out sets, and what either has
    is missing from training.

        seen = SeenDocuments()
        train = [document for document in documents if seen.add(document, "train") is None]

    Attributes:
        kept: Documents kept, by set.
        dropped: Documents dropped, by (set they came for, set that has them already).
        examples: Origins of the first dropped documents, by the same pairs.
    """

    def __init__(self) -> None:
        self.kept: Counter[str] = Counter()
        self.dropped: Counter[tuple[str, str]] = Counter()
        self.examples: dict[tuple[str, str], list[str]] = {}
        self._owners: dict[bytes, str] = {}

    def add(self, document: Document, set_name: str) -> str | None:
        """Enter a document for a set; the set, perhaps the same, that has its text already, or None if none has."""
        before = len(self._owners)
        owner = self._owners.setdefault(document.digest(), set_name)
        if len(self._owners) > before:
            self.kept[set_name] += 1
            return None
        self.dropped[set_name, owner] += 1
        examples = self.examples.setdefault((set_name, owner), [])
        if len(examples) < _KEPT_EXAMPLES:
            examples.append(document.origin)
        return owner

    def to_json(self) -> dict[str, Any]:
        """Counts and examples as JSON."""
        return {
            "kept": dict(sorted(self.kept.items())),
            "dropped": [
                {"set": ours, "already_in": owner, "documents": count, "examples": self.examples[(ours, owner)]}
                for (ours, owner), count in sorted(self.dropped.items())
            ],
        }

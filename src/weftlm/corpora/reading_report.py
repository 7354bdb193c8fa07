"""What reading met: how much was taken, and every fault counted by reason with its place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from weftlm.errors import DataError

Reason = Literal[
    "undecodable", "broken_json", "broken_csv", "not_an_object", "missing_field", "not_text", "empty", "missing_label",
    "too_large", "truncated", "unreadable",
]  # fmt: skip
KEPT_EXAMPLES = 5
"""Places remembered per reason."""


@dataclass
class ReadingReport:
    """Counts of what was read; one report may serve several inputs.

    Attributes:
        documents: Documents handed on.
        bytes: UTF-8 bytes of their text.
        files: Files opened.
        problems: Faulty records (or files) by reason.
        examples: The first places per reason, as `path:line: what is wrong`.
        faults_by_label: Faulty records (or files) by label; "" where a record has none.
        ignored_files: Entries of a folder that are not read: other suffixes, links that leave the folder, pipes.
        ignored_examples: The first of them.
        stopped_at: Places where `max_documents` or `max_bytes` ended the reading.
    """

    documents: int = 0
    bytes: int = 0
    files: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    faults_by_label: Counter[str] = field(default_factory=Counter)
    ignored_files: int = 0
    ignored_examples: list[str] = field(default_factory=list)
    stopped_at: list[str] = field(default_factory=list)

    def fail(self, reason: Reason, place: str, detail: str, *, stop: bool, label: str | None = None) -> None:
        """Count a fault and remember its place.

        Args:
            reason: Kind of fault.
            place: Place of the record.
            detail: What is wrong.
            stop: Whether to raise instead of going on.
            label: Label of the record, where it is known.
        Raises:
            DataError: `stop` is set; the message holds the place.
        """
        self.problems[reason] += 1
        self.faults_by_label[label or ""] += 1
        examples = self.examples.setdefault(reason, [])
        message = f"{place}: {detail}"
        if len(examples) < KEPT_EXAMPLES:
            examples.append(message)
        if stop:
            raise DataError(f"{message}; repair it, or set on_error: skip to leave such records out")

    def ignore(self, path: str) -> None:
        """Count an entry of a folder that is not read."""
        self.ignored_files += 1
        if len(self.ignored_examples) < KEPT_EXAMPLES:
            self.ignored_examples.append(path)

    def to_json(self) -> dict[str, Any]:
        """Everything but the counts by label, as JSON."""
        plain = {name: value for name, value in vars(self).items() if name != "faults_by_label"}
        return {
            **plain,
            "problems": dict(sorted(self.problems.items())),
            "examples": dict(sorted(self.examples.items())),
        }

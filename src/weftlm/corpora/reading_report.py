"""What reading met: how much was taken, and every fault counted by reason with its place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from weftlm.errors import DataError

Reason = Literal[
    "undecodable",
    "broken_json",
    "broken_csv",
    "not_an_object",
    "missing_field",
    "not_text",
    "empty",
    "missing_label",
    "too_large",
    "truncated",
    "unreadable",
]
REASONS: dict[Reason, str] = {
    "undecodable": "text that is not valid UTF-8",
    "broken_json": "lines that are not JSON",
    "broken_csv": "rows that are not CSV",
    "not_an_object": "lines whose JSON is not an object",
    "missing_field": "records without the text field",
    "not_text": "records whose text field is not text",
    "empty": "documents without text",
    "missing_label": "records without a usable label",
    "too_large": "documents that are too large",
    "truncated": "compressed files that end too early",
    "unreadable": "files that cannot be read",
}


@dataclass
class ReadingReport:
    """Counts of what was read; one report may serve several inputs.

    Attributes:
        keep_examples: places remembered per reason.
        documents: documents handed on.
        bytes: UTF-8 bytes of their text.
        files: files opened.
        blank_lines: lines of white space in JSON Lines files, which the format allows.
        problems: faulty records (or files) by reason; see `REASONS`.
        examples: the first places per reason, as `path:line: what is wrong`.
        faults_by_label: faulty records (or files) by label; "" where a record has none.
        ignored_files: entries of a folder that are not read: other suffixes, links that leave the folder, pipes.
        ignored_examples: the first of them.
        stopped_at: places where `max_documents` or `max_bytes` ended the reading.
    """

    keep_examples: int = 5
    documents: int = 0
    bytes: int = 0
    files: int = 0
    blank_lines: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    faults_by_label: Counter[str] = field(default_factory=Counter)
    ignored_files: int = 0
    ignored_examples: list[str] = field(default_factory=list)
    stopped_at: list[str] = field(default_factory=list)

    def fail(self, reason: Reason, place: str, detail: str, *, stop: bool, label: str | None = None) -> None:
        """Count a fault and remember its place.

        Args:
            reason: what kind of fault it is.
            place: where.
            detail: what is wrong.
            stop: raise instead of going on.
            label: of the record, where it is known.
        Raises:
            DataError: `stop` is set; the message holds the place.
        """
        self.problems[reason] += 1
        self.faults_by_label[label or ""] += 1
        examples = self.examples.setdefault(reason, [])
        message = f"{place}: {detail}"
        if len(examples) < self.keep_examples:
            examples.append(message)
        if stop:
            raise DataError(f"{message}; mend it, or set on_error: skip to leave such records out")

    def ignore(self, path: str) -> None:
        """Count an entry of a folder that is not read."""
        self.ignored_files += 1
        if len(self.ignored_examples) < self.keep_examples:
            self.ignored_examples.append(path)

    @property
    def skipped(self) -> int:
        """Faulty records in all."""
        return sum(self.problems.values())

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON."""
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "files": self.files,
            "blank_lines": self.blank_lines,
            "problems": dict(sorted(self.problems.items())),
            "examples": {reason: list(places) for reason, places in sorted(self.examples.items())},
            "ignored_files": self.ignored_files,
            "ignored_examples": list(self.ignored_examples),
            "stopped_at": list(self.stopped_at),
        }

    def lines(self) -> list[str]:
        """The report for people, one fact per line."""
        result = [f"{self.documents} documents, {self.bytes / 1e6:.1f} MB of text from {self.files} files"]
        for reason, count in sorted(self.problems.items()):
            result.append(f"skipped {count}: {REASONS[reason]}, such as")  # type: ignore[index]
            result += [f"    {place}" for place in self.examples[reason]]
        if self.ignored_files:
            result.append(f"{self.ignored_files} files left out, such as {', '.join(self.ignored_examples)}")
        if self.blank_lines:
            result.append(f"{self.blank_lines} blank lines")
        return result + [f"stopped at {place}" for place in self.stopped_at]

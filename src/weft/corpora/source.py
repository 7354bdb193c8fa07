"""The two values the corpora room deals in: a document of text, and a source of tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Document:
    """One document of text.

    Attributes:
        text: the text itself, valid Unicode.
        origin: where it came from, for people: `path:line`, `module.function` or `dataset[row]`.
        label: the domain the corpus gave it, or None when domains are to be discovered.
    """

    text: str
    origin: str
    label: str | None = None

    def digest(self) -> bytes:
        """BLAKE2b-128 of the text's UTF-8 bytes: the identity used for exact-duplicate removal and splits."""
        return hashlib.blake2b(self.text.encode("utf-8"), digest_size=16).digest()


@runtime_checkable
class Source(Protocol):
    """A domain's tokens in a fixed order.

    Attributes:
        fingerprint: hash of the ordered contents and of the tokenizer that made them.
    """

    fingerprint: str

    def __len__(self) -> int:
        """Number of tokens."""
        ...

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens `start .. start + count`, a fresh array of shape (count,)."""
        ...

    def read_many(self, starts_N: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """One run of `count` tokens from each start, a fresh array of shape (N, count)."""
        ...

"""A domain: a named part of the corpus, with what is trained on and what is held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weftlm.corpora.examples import Examples, examples_of
from weftlm.corpora.source import Source
from weftlm.corpora.store import TokenStore
from weftlm.errors import DataError


@dataclass(frozen=True)
class Domain:
    """One domain.

    Attributes:
        name: its name, unique among the domains.
        train: its training tokens.
        heldout: its held-out tokens, or None where it has too few documents to hold any out.
        documents: training documents.
        bytes: UTF-8 bytes of the training documents.
    """

    name: str
    train: Source
    heldout: TokenStore | None
    documents: int
    bytes: int


class TokenPrefix:
    """The first `tokens` tokens of a source, itself a source: an exact cap.

    Args:
        source: what to cut.
        tokens: how many tokens stay, from 1 to `len(source)`.
    Raises:
        DataError: the source is shorter.
    """

    def __init__(self, source: Source, tokens: int) -> None:
        if not 1 <= tokens <= len(source):
            raise DataError(f"the first {tokens} tokens are asked of a source that holds {len(source)}")
        self._source = source
        self._tokens = tokens
        named = f"{source.fingerprint} first {tokens}".encode()
        self.fingerprint = hashlib.blake2b(named, digest_size=16).hexdigest()

    def __len__(self) -> int:
        return self._tokens

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        self._check(start, start + count)
        return self._source.read(start, count)

    def read_many(self, starts_N: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        if len(starts_N):
            self._check(int(np.min(starts_N)), int(np.max(starts_N)) + count)
        return self._source.read_many(starts_N, count)

    @property
    def examples(self) -> Examples | None:
        """The examples of the source that are whole within the cap; None where it holds none."""
        found = examples_of(self._source)
        return None if found is None else found.until(self._tokens, self.fingerprint)

    def _check(self, start: int, end: int) -> None:
        if start < 0 or end > self._tokens or end < start:
            raise IndexError(f"tokens {start} .. {end} of a source cut to {self._tokens}")

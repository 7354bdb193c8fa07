"""The two values the corpora room deals in: a document of text, and a source of tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from weftlm.errors import DataError


@dataclass(frozen=True)
class Document:
    """One document of text.

    Attributes:
        text: the text itself, valid Unicode.
        origin: where it came from, for people: `path:line`, `module.function` or `dataset[row]`.
        label: the domain the corpus gave it, or None when domains are to be discovered.
        prompt: Number of characters of the text that are the prompt of an example; the rest, never empty, is its
            target. None for plain text.
    """

    text: str
    origin: str
    label: str | None = None
    prompt: int | None = None

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


class TokenReader:
    """Reading of tokens that are in one array, in memory or mapped from disk; part of a `Source`."""

    _tokens: NDArray[Any]

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """See `Source.read`.

        Raises:
            IndexError: The run is not within the source.
        """
        self._check(start, start + count, count)
        return self._tokens[start : start + count].astype(np.int64)

    def read_many(self, starts_N: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """See `Source.read_many`.

        Raises:
            IndexError: A run is not within the source.
        """
        starts_N = np.asarray(starts_N, dtype=np.int64)
        if len(starts_N) == 0 or count == 0:
            return np.empty((len(starts_N), count), dtype=np.int64)
        self._check(int(starts_N.min()), int(starts_N.max()) + count, count)
        runs_TC = np.lib.stride_tricks.sliding_window_view(self._tokens, count)  # every run of `count` tokens, a view
        return runs_TC[starts_N].astype(np.int64)

    def _check(self, start: int, end: int, count: int) -> None:
        if start < 0 or count < 0 or end > len(self):
            raise IndexError(f"tokens {start} .. {end} of a source of {len(self)}")


class ArraySource(TokenReader):
    """Tokens held in memory as a `Source`: for tests, benchmarks and loops that bring their own tokens.

    Args:
        tokens: Token ids, one-dimensional.
        text_bytes: UTF-8 bytes of their text; needed for bits per byte only.
    Raises:
        DataError: The tokens are not one row of whole numbers, none of them negative.
    """

    def __init__(self, tokens: ArrayLike, *, text_bytes: int = 0) -> None:
        came = f"tokens are a {type(tokens).__name__}"
        try:
            array = np.asarray(tokens)
        except (ValueError, TypeError, RuntimeError) as error:  # rows of different lengths, tensors that are elsewhere
            raise DataError(f"{came} of no one shape or not in memory; give one row of integers") from error
        if array.shape == (0,):
            array = array.astype(np.int64)
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise DataError(f"{came} of shape {array.shape} and dtype {array.dtype}; give one row of integers")
        if len(array) and (array.min() < 0 or array.max() >= 2**63):
            raise DataError(f"tokens go from {array.min()} to {array.max()}; token ids are 0 or more, below 2^63")
        self._tokens = np.ascontiguousarray(array, dtype=np.int64)
        self.bytes = text_bytes
        self.fingerprint = hashlib.blake2b(self._tokens.tobytes(), digest_size=16).hexdigest()

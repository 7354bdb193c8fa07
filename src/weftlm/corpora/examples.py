"""Examples: documents that are a prompt and its target, over the tokens of a source.

The source holds the documents one after the other, each as prompt, target, end-of-document token; `Examples` holds
where each of them begins and ends. Without it, the source reads as text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from weftlm.corpora.source import ArraySource, Source
from weftlm.errors import DataError


class Example(NamedTuple):
    """One example in token ids, int64, without special tokens."""

    prompt_P: NDArray[np.int64]
    target_C: NDArray[np.int64]


class Examples:
    """The examples of a source of tokens.

    Args:
        source: Source of the tokens.
        spans_N2: Start and end of each document in tokens, its end-of-document token included, int64.
        prompts: Tokens of each prompt.
        target_bytes: UTF-8 bytes of each target.
        eos_id: End-of-document token.
    Attributes:
        starts_N: Position of each example's first token, int64.
        prompts_N: Tokens of each prompt, int64.
        targets_N: Tokens of each target, the end-of-document token not counted, int64.
        target_bytes_N: UTF-8 bytes of each target, int64.
        fingerprint: Fingerprint of the source, which covers where prompts end.
    """

    def __init__(
        self, source: Source, spans_N2: NDArray[np.int64], prompts: ArrayLike, target_bytes: ArrayLike, eos_id: int
    ) -> None:
        self.source, self.eos_id, self.fingerprint = source, eos_id, source.fingerprint
        self.starts_N = spans_N2[:, 0].copy()
        self.prompts_N = np.asarray(prompts).astype(np.int64)
        self.targets_N = spans_N2[:, 1] - spans_N2[:, 0] - 1 - self.prompts_N
        self.target_bytes_N = np.asarray(target_bytes).astype(np.int64)

    def __len__(self) -> int:
        return len(self.starts_N)

    def read(self, indices_B: Sequence[int] | NDArray[Any]) -> list[Example]:
        """Some examples, in the order asked for.

        Raises:
            IndexError: there is no such example.
        """
        found = []
        for index in np.asarray(indices_B, dtype=np.int64).tolist():
            if not 0 <= index < len(self):
                raise IndexError(f"example {index} of {len(self)}")
            cut = int(self.prompts_N[index])
            ids_N = self.source.read(int(self.starts_N[index]), cut + int(self.targets_N[index]))
            found.append(Example(ids_N[:cut], ids_N[cut:]))
        return found


class ExampleSource(ArraySource):
    """Examples held in memory as a `Source`: for tests, and for loops that bring their own tokens.

    Args:
        examples: Prompt and target of each, in token ids without special tokens.
        eos_id: Token put after every example.
        target_bytes: UTF-8 bytes of each target; needed for bits per byte only.
    Raises:
        DataError: There is no example, or one without target.
    """

    def __init__(
        self,
        examples: Sequence[tuple[ArrayLike, ArrayLike]],
        eos_id: int,
        *,
        target_bytes: Sequence[int] | None = None,
    ) -> None:
        pairs = [Example(np.asarray(p, dtype=np.int64), np.asarray(t, dtype=np.int64)) for p, t in examples]
        if not pairs or any(len(pair.target_C) == 0 for pair in pairs):
            raise DataError(f"{len(pairs)} examples were given; give at least one, each with a target")
        ids_N = np.concatenate([part for pair in pairs for part in (*pair, np.array([eos_id]))]).astype(np.int64)
        lengths_N = np.array([len(pair.prompt_P) + len(pair.target_C) + 1 for pair in pairs])
        prompts_N = np.array([len(pair.prompt_P) for pair in pairs], dtype=np.int64)
        sizes_N = np.zeros(len(pairs), dtype=np.int64) if target_bytes is None else np.asarray(target_bytes)
        super().__init__(ids_N, text_bytes=int(sizes_N.sum()))
        total = hashlib.blake2b(ids_N.tobytes() + prompts_N.tobytes() + lengths_N.tobytes(), digest_size=16)
        self.fingerprint = total.hexdigest()
        ends_N = np.cumsum(lengths_N)
        spans_N2 = np.stack([ends_N - lengths_N, ends_N], axis=1)
        self.examples = Examples(self, spans_N2, prompts_N, sizes_N, eos_id)


def examples_of(source: object) -> Examples | None:
    """The examples a source holds; None for plain text."""
    found = getattr(source, "examples", None)
    return found if isinstance(found, Examples) else None

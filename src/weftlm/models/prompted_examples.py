"""The examples of a source as a model of one kind and length reads them: how long each is, which are scored, in ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weftlm.corpora.examples import Examples
from weftlm.models.prompted import Prompted, fitted


@dataclass(frozen=True, eq=False)
class PromptedExamples:
    """Examples under a limit of tokens; `fitted` says what the limit cuts.

    Attributes:
        examples: the whole ones.
        length: T, the limit.
        encoder: whether the model has an encoder for the prompt.
    """

    examples: Examples
    length: int
    encoder: bool

    def __len__(self) -> int:
        return len(self.examples)

    def rows(self, indices_B: Sequence[int] | NDArray[Any]) -> list[Prompted]:
        """Some examples in ids, in the order asked for."""
        return [
            fitted(*example, eos_id=self.examples.eos_id, length=self.length, encoder=self.encoder)
            for example in self.examples.read(indices_B)
        ]

    @property
    def targets_N(self) -> NDArray[np.int64]:
        """Tokens predicted of each example: those of its target that are kept, and its end."""
        whole_N = self.examples.targets_N + 1
        if self.encoder:
            return np.minimum(whole_N, self.length)
        prompts_N = np.maximum(self.examples.prompts_N, 1)
        kept_N: NDArray[np.int64] = np.minimum(
            whole_N, np.maximum(self.length - prompts_N, self.length - self.length // 2)
        )
        return kept_N

    @property
    def prompts_N(self) -> NDArray[np.int64]:
        """Tokens of each prompt that are read."""
        if self.encoder:
            return np.minimum(self.examples.prompts_N, self.length - 1) + 1
        return np.minimum(np.maximum(self.examples.prompts_N, 1), self.length - self.targets_N)

    @property
    def bytes_N(self) -> NDArray[np.float64]:
        """UTF-8 bytes of each target behind the tokens predicted: of a cut one, as large a part as is kept of it."""
        share_N = self.targets_N / (self.examples.targets_N + 1)
        bytes_N: NDArray[np.float64] = self.examples.target_bytes_N * share_N
        return bytes_N

    def evenly(self, max_tokens: int | None) -> NDArray[np.int64]:
        """Indices of evenly spaced examples with about so many target tokens, at least one; None for all.

        The same ones at every evaluation and on every machine.
        """
        count, tokens = len(self), int(self.targets_N.sum())
        take = count if max_tokens is None else min(count, max(1, max_tokens * count // tokens))
        return (2 * np.arange(take, dtype=np.int64) + 1) * count // (2 * take)

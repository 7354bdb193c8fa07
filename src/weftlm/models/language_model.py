"""The contract every language model meets for evaluation: base, expert, gated model and student alike."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class LanguageModel(Protocol):
    """A distribution over the next token after every prefix.

    Attributes:
        vocab_size: V.
    """

    vocab_size: int

    def log_probs(self, tokens_BT: Tensor) -> Tensor:
        """log p(. | tokens[:, :t + 1]) for every position t.

        Args:
            tokens_BT: int64 token ids.
        Returns:
            logp_BTV: nats, float32, normalised over V.
        """
        ...

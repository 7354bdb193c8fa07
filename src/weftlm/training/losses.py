"""What the training loop minimises: a loss of each drawn sequence, and what it weighs."""

from __future__ import annotations

from torch import Tensor, nn

from weftlm.mixture.loader import Batch
from weftlm.models.hf import token_losses


class BatchLoss:
    """How a batch that was drawn becomes a loss: sum_b w_b mean_t l_bt / B over all processes.

    This one is the cross-entropy of every next token, each sequence weighed as the draw says; others derive from it.

    Args:
        tokens_per_sequence: tokens trained on per drawn sequence, on average; for counts and speeds.
    """

    def __init__(self, tokens_per_sequence: float) -> None:
        self.tokens_per_sequence = float(tokens_per_sequence)

    def prepare(self, batch: Batch) -> Batch:
        """The batch with its rows replaced, reordered or weighed; called once per step, on every process."""
        return batch

    def __call__(self, model: nn.Module, tokens_BT1: Tensor) -> Tensor:
        """losses_BT of a micro-batch, in nats, with their gradient; T may be 1."""
        return token_losses(model, tokens_BT1)

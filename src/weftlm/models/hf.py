"""Losses of Hugging Face causal language models, and what their compositions do in place of `save_pretrained`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weftlm.errors import ConfigError

UPLOAD = "write it with save_pretrained(folder) and upload that folder (huggingface_hub's upload_folder)"
"""What to do where `push_to_hub` would upload another model than the one it is called on."""
_DEFAULTS = {"is_main_process", "safe_serialization", "save_peft_format", "save_original_format"}

SequenceLosses = Callable[[nn.Module, Tensor], Tensor]
"""A loss: (model, tokens_BT1) -> losses_B, the mean nats per token of each sequence."""


def token_losses(model: nn.Module, tokens_BT1: Tensor) -> Tensor:
    """Next-token cross-entropy of every position.

        loss[b, t] = -log p(tokens[b, t + 1] | tokens[b, :t + 1])

    Args:
        model: Causal language model whose output has `.logits` of shape (B, T, V).
        tokens_BT1: Token ids, int64, T inputs and the label after each.
    Returns:
        losses_BT: nats, float32 or better.
    """
    logits_BTV = model(input_ids=tokens_BT1[:, :-1], use_cache=False).logits
    if logits_BTV.dtype in (torch.float16, torch.bfloat16):
        logits_BTV = logits_BTV.float()
    labels_BT = tokens_BT1[:, 1:]
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="none").view(labels_BT.shape)


def sequence_losses(model: nn.Module, tokens_BT1: Tensor) -> Tensor:
    """Mean next-token cross-entropy of each sequence: losses_B, nats per token. See `token_losses`."""
    return token_losses(model, tokens_BT1).mean(dim=1)


def save_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' `save_pretrained` for the base models in the folder of a model made of several.

    Args:
        given: Arguments of a call; None, False and a base's own defaults ask for nothing.
    Returns:
        What each base's `save_pretrained` is to be given.
    Raises:
        ConfigError: one that a folder of several models cannot follow.
    """
    asked = {name: value for name, value in given.items() if value not in (None, False) and name not in _DEFAULTS}
    if "push_to_hub" in asked:
        raise ConfigError(f"save_pretrained does not upload this model: {UPLOAD}")
    if refused := asked.keys() - {"max_shard_size", "token"}:
        raise ConfigError(
            f"save_pretrained of this model takes no {', '.join(sorted(refused))}: the weights are those of its base "
            "models and experts; leave it out"
        )
    return asked

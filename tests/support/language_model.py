"""A Hugging Face model behind the `LanguageModel` contract, as a model of another library could be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HFLanguageModel:
    """Log-probabilities of a causal language model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])

    def log_probs(self, tokens_BT: Tensor) -> Tensor:
        with torch.inference_mode():
            logits_BTV: Tensor = self.model(input_ids=tokens_BT, use_cache=False).logits
            return torch.log_softmax(logits_BTV.float(), dim=-1)

"""Opened models that lie nowhere: any tiny model in memory as the serving side takes it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from support import experts as tiny
from support import served
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from weftlm.corpora.tokens import Tokenizer
from weftlm.gating.experts import ExpertPool
from weftlm.gating.gate import Gate
from weftlm.gating.modular_lm import ModularLM
from weftlm.pipeline.any_model import OpenModel
from weftlm.routing.routed_model import RoutedModel

_SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.15,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


@functools.cache
def _tokenizer() -> Tokenizer:
    return served.tokenizer()


def plain(model: PreTrainedModel) -> OpenModel:
    """A plain model."""
    return OpenModel("plain", "plain", model, _tokenizer(), ())


def routed(
    router: dict[str, Any] | str, *, count: int = 4, base: Callable[[], PreTrainedModel] = tiny.llama
) -> OpenModel:
    """A routed model over random experts."""
    model = base()
    experts = tiny.make_pool(model, count)
    routed_model = RoutedModel(model, experts, router).eval()
    return OpenModel("routed", "routed", routed_model, _tokenizer(), tuple(expert.name for expert in experts))


def gated(pool: ExpertPool, gate: Gate, **settings: Any) -> OpenModel:
    """A gated model."""
    return OpenModel("gated", "gated", ModularLM(pool, gate, **settings), _tokenizer(), pool.names)


def sliding(**changed: Any) -> PreTrainedModel:
    """Two layers that see eight tokens."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**{**_SIZES, "sliding_window": 8, **changed})).eval()


def mixture_of_experts() -> PreTrainedModel:
    """A model with experts of its own."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=4)).eval()


def eager() -> PreTrainedModel:
    """A model whose attention is written out."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SIZES, attn_implementation="eager")).eval()


def long_rope() -> PreTrainedModel:
    """A model whose positions depend on the text's length."""
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return LlamaForCausalLM(LlamaConfig(**_SIZES, rope_parameters=rope)).eval()


def without_keys() -> PreTrainedModel:
    """A model whose memory is no cache of keys and values."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, state_size=4, num_hidden_layers=1, bos_token_id=None, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    return MambaForCausalLM(config).eval()

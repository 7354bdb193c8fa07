"""Opened models without a folder: any tiny model in memory as the serving side takes it."""

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

_SIZES: dict[str, Any] = {**tiny.SIZES, "pad_token_id": None}


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
    return tiny.seeded(MistralForCausalLM, MistralConfig(**{**_SIZES, "sliding_window": 8, **changed}))


def mixture_of_experts() -> PreTrainedModel:
    """A model with experts of its own."""
    return tiny.seeded(MixtralForCausalLM, MixtralConfig(**_SIZES, num_local_experts=4))


def eager() -> PreTrainedModel:
    """A model whose attention is written out."""
    return tiny.seeded(LlamaForCausalLM, LlamaConfig(**_SIZES, attn_implementation="eager"))


def long_rope() -> PreTrainedModel:
    """A model whose positions depend on the text's length."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return tiny.seeded(LlamaForCausalLM, LlamaConfig(**_SIZES, rope_parameters=rope))


def without_keys() -> PreTrainedModel:
    """A model whose memory is no cache of keys and values."""
    torch.manual_seed(0)
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = MambaConfig(vocab_size=tiny.VOCAB, hidden_size=16, state_size=4, num_hidden_layers=1, **tokens)
    return MambaForCausalLM(config).eval()

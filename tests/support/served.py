"""Tiny models of every kind in folders of their own, each with a tokenizer, as servers and harnesses open them."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from support.experts import make_pool
from support.tiny_project import WORDS, sentence
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from weftlm.corpora.config import TrainConfig
from weftlm.corpora.tokens import Tokenizer, train_tokenizer
from weftlm.experts.expert import BaseReference
from weftlm.gating.bayes import FixedShareGate
from weftlm.gating.config import ExpertSource
from weftlm.gating.experts import ExpertPool
from weftlm.gating.modular_lm import ModularLM
from weftlm.routing.routed_model import RoutedModel

KINDS = ("plain", "routed", "gated")
VOCAB, POSITIONS = 320, 256


def tokenizer(fewer: int = 0) -> Tokenizer:
    """A byte-level BPE of at most 320 tokens, less some for others to add, over made-up sentences."""
    rng = random.Random(0)
    texts = [sentence(rng, words) for words in WORDS.values() for _ in range(30)]
    return train_tokenizer(texts, TrainConfig(vocab_size=VOCAB - fewer))


def llama(seed: int = 0) -> LlamaForCausalLM:
    """Two random layers; weights are large enough for the layers to matter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.15, bos_token_id=None,
        eos_token_id=256, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def t5(seed: int = 0) -> T5ForConditionalGeneration:
    """A random layer of encoder and one of decoder, gated as in T5 v1.1."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0, eos_token_id=256,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def write_encoder_decoder(folder: Path, seed: int = 0) -> Path:
    """Write a tiny T5 with the tokenizer of the others; returns its folder."""
    t5(seed).save_pretrained(folder)
    tokenizer().save(folder)
    return folder


def write_model(folder: Path, kind: str, seed: int = 0) -> Path:
    """Write a model of a kind under `folder`; returns the place to open."""
    words = tokenizer()
    base = folder / "base"
    llama(seed).save_pretrained(base)
    words.save(base)
    if kind == "plain":
        return base
    if kind == "routed":
        model = llama(seed)
        reference = BaseReference(str(base))
        routed = RoutedModel(model, make_pool(model, 3, base=reference), "phatgoose", base=reference)
        routed.save_pretrained(folder / "routed")
        words.save(folder / "routed" / "tokenizer")
        return folder / "routed"
    other = folder / "other"
    llama(seed + 1).save_pretrained(other)
    words.save(other)
    sources = [ExpertSource(name=place.name, model=str(place)) for place in (base, other)]
    ModularLM(ExpertPool.load(sources), FixedShareGate.of([0.5, 0.5], 0.05)).save_pretrained(folder / "gated")
    return folder / "gated"

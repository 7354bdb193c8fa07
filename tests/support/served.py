"""Tiny models of every kind in folders of their own, each with a tokenizer, as servers and harnesses open them."""

from __future__ import annotations

import random
from pathlib import Path

from support import experts
from support.experts import make_pool
from support.tiny_project import WORDS, sentence
from transformers import LlamaForCausalLM

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
    """Two random layers that know the tokenizer's tokens."""
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "eos_token_id": 256, "pad_token_id": None}
    return experts.llama(seed, **sizes)


def write_encoder_decoder(folder: Path, seed: int = 0) -> Path:
    """Write a tiny T5 with the tokenizer of the others; returns its folder."""
    experts.t5(seed, vocab_size=VOCAB, eos_token_id=256, num_layers=1).save_pretrained(folder)
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

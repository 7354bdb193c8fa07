"""A base of two layers, text that is nearly a cycle, and adapters that are not trained at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from weftlm.corpora.examples import ExampleSource
from weftlm.corpora.source import ArraySource
from weftlm.experts.expert import BaseReference, LoRAExpert, LoRAFactors
from weftlm.models.lora_targets import linear_widths

VOCAB, LENGTH = 64, 16
Q, V, DOWN = (f"model.layers.{layer}" for layer in ("0.self_attn.q_proj", "1.self_attn.v_proj", "1.mlp.down_proj"))


def llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": VOCAB, "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **config})).eval()


def random_expert(
    model: nn.Module, modules: Mapping[str, int] | None = None, *, seed: int = 1, size: float = 0.3
) -> LoRAExpert:
    """Random factors of the given rank on each module."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, rank in (modules or {Q: 2, V: 3, DOWN: 4}).items():
        widths = linear_widths(model.get_submodule(name))
        assert widths is not None
        A_RI = size * torch.randn(rank, widths[0], generator=generator)
        factors[name] = LoRAFactors(A_RI, size * torch.randn(widths[1], rank, generator=generator), 1.5 / rank)
    return LoRAExpert("tiny", BaseReference("tiny-base"), factors, {})


def cyclic_source(tokens: int = 2000, *, low: int = 0, seed: int = 0) -> ArraySource:
    """A noisy cycle through 20 tokens; three bytes a token."""
    rng = np.random.default_rng(seed)
    cycle = low + (np.arange(tokens) * 3) % 20
    noisy = np.where(rng.random(tokens) < 0.8, cycle, rng.integers(low, low + 20, tokens))
    return ArraySource(noisy, text_bytes=3 * tokens)


def task(count: int = 60, seed: int = 0) -> ExampleSource:
    """Examples whose answer to some numbers is the last of them, one more and two more."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 40, rng.integers(1, 9)) for _ in range(count)]
    targets = [[int(prompt[-1]) + more for more in range(1 + i % 3)] for i, prompt in enumerate(prompts)]
    return ExampleSource(
        list(zip(prompts, targets, strict=True)), eos_id=63, target_bytes=[2 * len(target) for target in targets]
    )


class Fingerprint:
    """Everything of a model that must be as before: modules, attributes, hooks, flags, modes and weights."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {name: (module, type(module)) for name, module in model.named_modules()}
        self.attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
        self.hooks = {
            name: [len(module._forward_hooks), len(module._forward_pre_hooks)] for name, module in model.named_modules()
        }
        self.modes = {name: module.training for name, module in model.named_modules()}
        self.flags = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def check(self, model: nn.Module) -> None:
        now = Fingerprint(model)
        assert now.modules == self.modules
        assert now.attributes == self.attributes
        assert now.hooks == self.hooks
        assert now.modes == self.modes
        assert now.flags.keys() == self.flags.keys()
        for name, (parameter, flag) in self.flags.items():
            assert now.flags[name][0] is parameter, name
            assert now.flags[name][1] == flag, name
        assert now.state.keys() == self.state.keys()
        for name, tensor in self.state.items():
            assert torch.equal(now.state[name], tensor), name

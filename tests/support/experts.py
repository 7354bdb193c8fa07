"""Tiny base models of four architectures, and pools of random experts over them; no training anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from weftlm.experts.expert import BaseReference, Expert, Gate, LoRAExpert, LoRAFactors, Statistics
from weftlm.experts.statistics import BIGRAM_BUCKETS, embed_tokens
from weftlm.models.lora_targets import linear_widths

VOCAB = EMBEDDING = 64
BASE = BaseReference("tiny-base")

# No end-of-text token: generation always runs to its full length. Weights are large enough for the layers to matter.
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.15, **_TOKENS,
}  # fmt: skip
"""Two layers, four heads over two key-value heads."""


def seeded(kind: type[PreTrainedModel], config: Any, seed: int = 0) -> Any:
    """A model in evaluation mode whose biases are not zero, which would hide a bias used twice or never."""
    torch.manual_seed(seed)
    model = kind(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """The model of `SIZES`, with some of its settings changed."""
    return seeded(LlamaForCausalLM, LlamaConfig(**{**SIZES, **config}), seed)


def qwen2(seed: int = 0) -> Qwen2ForCausalLM:
    """As `llama`, with biases on queries, keys and values."""
    return seeded(Qwen2ForCausalLM, Qwen2Config(**SIZES), seed)


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Two layers of Conv1D modules, whose weights are input x output."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.15, **_TOKENS)
    return seeded(GPT2LMHeadModel, config, seed)


def t5(seed: int = 0, **config: Any) -> T5ForConditionalGeneration:
    """Two layers of encoder and of decoder, gated feed-forward as in T5 v1.1."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "initializer_factor": 1.0}
    style = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    model = seeded(T5ForConditionalGeneration, T5Config(**{**sizes, **style, **_TOKENS, **config}), seed + 2)
    # A head of its own, or the model would repeat its last token for ever.
    model.lm_head.weight = nn.Parameter(0.2 * torch.randn(model.config.vocab_size, 32))
    return model


BASES: dict[str, Callable[..., PreTrainedModel]] = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "t5": t5}


def linear_modules(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Input and output width of every linear module but the output head, by name, in the model's order."""
    found = ((name, linear_widths(module)) for name, module in model.named_modules())
    return {name: widths for name, widths in found if widths is not None and not name.endswith("lm_head")}


def make_expert(
    model: nn.Module,
    name: str = "a",
    *,
    seed: int = 0,
    modules: Iterable[str] | None = None,
    rank: int | None = None,
    scale: float | None = None,
    size: float = 0.3,
    base: BaseReference = BASE,
    gate: bool = True,
    statistics: bool = True,
) -> Expert:
    """An expert with random factors, gate and statistics.

    Args:
        modules: Modules it adapts; None for all linear ones.
        rank, scale: Rank and scale of every module; None for ranks from 1 to 6 and scales from 0.25 to 2, drawn.
        size: Standard deviation of the factors.
        gate, statistics: Whether it has them.
    """
    generator = torch.Generator().manual_seed(1000 + seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    widths = linear_modules(model)
    factors, vectors, means = {}, {}, {}
    for module in widths if modules is None else modules:
        wide, out = widths[module]
        r = int(torch.randint(1, 7, (), generator=generator)) if rank is None else rank
        s = 0.25 * int(torch.randint(1, 9, (), generator=generator)) if scale is None else scale
        factors[module] = LoRAFactors(size * randn(r, wide), size * randn(out, r), s)
        vectors[module], means[module] = randn(wide), randn(wide) + 0.5
    conv1d = any(isinstance(module, Conv1D) for module in model.modules())
    adapter = LoRAExpert(name, base, factors, {"task_type": None, "fan_in_fan_out": conv1d})
    texts_NT = torch.randint(1, VOCAB, (6, 8), generator=generator)
    facts = Statistics(
        means,
        embed_tokens(texts_NT, width=EMBEDDING),
        f"tokens-{EMBEDDING}",
        torch.bincount(texts_NT.flatten(), minlength=VOCAB),
        torch.randint(0, 3, (BIGRAM_BUCKETS,), generator=generator),
        {"examples": 6, "tokens": 48, "seed": seed},
    )
    return Expert(adapter, Gate(vectors, {"steps": 1}) if gate else None, facts if statistics else None, {"seed": seed})


def make_pool(
    model: nn.Module, count: int = 4, *, seed: int = 0, mixed: bool = True, **options: object
) -> list[Expert]:
    """Experts "a", "b", ...; `options` are those of `make_expert`.

    Args:
        mixed: Whether only the first adapts every linear module, the others about two thirds of them, drawn at random.
    """
    names = list(linear_modules(model))
    pool = []
    for place in range(count):
        drawn = torch.rand(len(names), generator=torch.Generator().manual_seed(50 + seed + place)) < 0.67
        modules = [name for name, keep in zip(names, drawn.tolist(), strict=True) if keep or place == 0]
        pool.append(
            make_expert(model, chr(ord("a") + place), seed=seed + place, modules=modules if mixed else None, **options)
        )
    return pool


def with_gate(expert: Expert, change: Callable[[Tensor], Tensor]) -> Expert:
    """An expert whose gate vectors are changed."""
    assert expert.gate is not None
    return replace(expert, gate=Gate({name: change(v_I) for name, v_I in expert.gate.vectors.items()}))


def with_texts(expert: Expert, tokens_NT: Tensor) -> Expert:
    """An expert whose training inputs were these, for retrieval."""
    assert expert.statistics is not None
    embeddings_NF = embed_tokens(tokens_NT, width=EMBEDDING)
    return replace(expert, statistics=replace(expert.statistics, embeddings_NF=embeddings_NF))


def renamed(expert: Expert, name: str) -> Expert:
    """The same expert under another name."""
    return replace(expert, lora=replace(expert.lora, name=name))


def prompts(count: int = 3, length: int = 7, *, seed: int = 0) -> Tensor:
    """Random token ids without the padding id: count x length."""
    return torch.randint(1, VOCAB, (count, length), generator=torch.Generator().manual_seed(200 + seed))


def padded(rows: Sequence[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    """Sequences of different lengths as one batch with the padding on one side: ids_BT and attention_mask_BT."""
    side = "left" if left else "right"
    batch = nn.utils.rnn.pad_sequence
    ones = [torch.ones_like(row) for row in rows]
    return batch(rows, batch_first=True, padding_side=side), batch(ones, batch_first=True, padding_side=side)

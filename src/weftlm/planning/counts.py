"""Counting the work of a model from the shapes of its modules; nothing is run.

Of a pass over B sequences of T tokens (Kaplan et al. 2020, arXiv:2001.08361; Chowdhery et al. 2022, arXiv:2204.02311):

    forward      2 M + 4 L A T  FLOPs per token (attention in full, also where it skips what is masked)
    step         three times that, four times with recomputed activations; twice and an adapter where only that learns
    activations  SAVED sum (I + O) numbers per token, of one layer and L inputs where they are recomputed,
                 and LOGITS V float32 numbers

M weights of matrices that a token meets, I and O input and output width of each, sums over all of them; L layers, A
width of all heads, V vocabulary. A decoder under an encoder reads and predicts `TARGET_SHARE` times as many tokens.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from transformers import PretrainedConfig

from weftlm.gating.config import ExpertSource
from weftlm.gating.experts import ExpertPool
from weftlm.models.config import LoRASection
from weftlm.models.factory import count_parameters, with_lora
from weftlm.models.lora_targets import linear_widths, lora_targets
from weftlm.models.open import DTYPES, from_architecture, outline
from weftlm.planning.hardware import Work
from weftlm.training.parallel import decoder_layers

TARGET_SHARE = 0.25
"""Target tokens of an example over its prompt tokens, for encoder-decoders; an assumption."""
SAVED, LOGITS = 1.25, 3.0
"""Numbers that are alive when the backward pass begins over those that go in and out of matrices, and over logits."""
MOVED = 4.0
"""Reads and writes of a number that goes in or out of a matrix, by all operations of a forward pass."""
CALLS = 3.0
"""Kernels per module of a forward pass; a step, compiled, launches about as many."""


@dataclass(frozen=True)
class Counted:
    """A model whose work is counted, and the number of experts on it, each through an adapter where there is one.

    Its parameters are held in `dtype`; with `bf16` it runs under autocast. All are trained where there is no adapter.
    """

    config: PretrainedConfig
    dtype: str = "float32"
    bf16: bool = False
    checkpointing: bool = False
    adapter: LoRASection | None = None
    experts: int = 1

    @classmethod
    def of_pool(cls, sources: Sequence[ExpertSource], *, dtype: str, bf16: bool) -> list[Self]:
        """The models of `gating.pool` and how many experts run on each, checked as the scoring stage checks them.

        Adapters over one model are taken as one of the largest rank on every kind of module that any of them adapts.

        Raises:
            ConfigError, ExpertError: as `ExpertPool.load`.
        """
        pool, found = ExpertPool.load(sources, device="meta"), []
        for backbone in pool.backbones:
            loras = [pool.members[place].lora for place in backbone.experts]
            factors = {name: each for lora in loras if lora is not None for name, each in lora.modules.items()}
            names = sorted({name.rpartition(".")[2] for name in factors})
            rank = max((each.rank for each in factors.values()), default=0)
            adapter = LoRASection(rank=rank, target_modules=names) if factors else None
            config = backbone.model.config.get_text_config()
            found.append(cls(config, dtype, bf16, adapter=adapter, experts=len(loras)))
        return found

    # -- sizes ------------------------------------------------------------------------------------------------------

    @cached_property
    def outline(self) -> Any:
        """The bare model on the meta device."""
        return outline(self.config)

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Input and output width of every linear module, by name."""
        widths = {name: linear_widths(module) for name, module in self.outline.named_modules()}
        return {name: found for name, found in widths.items() if found is not None}

    @cached_property
    def targets(self) -> dict[str, tuple[int, int]]:
        """The same of the adapter's target modules."""
        names = [] if self.adapter is None else lora_targets(self.outline, self.adapter.target_modules)
        return {name: self.matrices[name] for name in names}

    @property
    def adapter_parameters(self) -> int:
        """Number of the adapter's parameters."""
        return 0 if self.adapter is None else self.adapter.rank * sum(i + o for i, o in self.targets.values())

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, tied ones once, with the adapter's."""
        return count_parameters(self.outline) + self.adapter_parameters

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return self.parameters if self.adapter is None else self.adapter_parameters

    @property
    def item(self) -> int:
        """Bytes of a parameter."""
        return DTYPES[self.dtype].itemsize

    @property
    def half(self) -> bool:
        """Whether matrix products are in half precision."""
        return self.bf16 or self.item == 2

    @cached_property
    def largest_unit(self) -> int:
        """Parameters of the largest layer, or of everything outside the layers: what FSDP2 gathers at once."""
        layers = [count_parameters(layer) for layer in decoder_layers(self.outline)]
        return max([count_parameters(self.outline) - sum(layers), *layers])

    @property
    def heads(self) -> tuple[int, int]:
        """Width of all heads of a layer, and of those of keys."""
        config, heads = self.config, getattr(self.config, "num_attention_heads", 0)
        width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
        return heads * width, (getattr(config, "num_key_value_heads", None) or heads) * width

    @property
    def kv_bytes(self) -> float:
        """Bytes of the keys and values of one token in all layers."""
        return 2.0 * int(self.config.num_hidden_layers) * self.heads[1] * self.item

    # -- work -------------------------------------------------------------------------------------------------------

    def predicted(self, length: int) -> int:
        """Tokens of a sequence that are predicted: all of them, or the target's."""
        return max(1, round(TARGET_SHARE * length)) if self.config.is_encoder_decoder else length

    def per_token(self, length: int, number: Callable[[int, int], float]) -> float:
        """Sum of a number of each matrix's widths over the tokens that it reads of a sequence."""
        read = {True: length, False: self.predicted(length)}
        return sum(number(*widths) * read["encoder" in name.split(".")] for name, widths in self.matrices.items())

    def forward(self, batch: int, length: int, context: int | None = None) -> Work:
        """Losses of a batch without gradients, or a token of every sequence behind `context` others."""
        seen, target = length if context is None else context, self.predicted(length)
        pairs = length * seen + (target * (target + length) if self.config.is_encoder_decoder else 0)
        flops = 4.0 * self.config.num_hidden_layers * self.heads[0] * pairs + 2.0 * self.adapter_parameters * length
        flops += self.per_token(length, lambda i, o: 2.0 * i * o)
        for parameter in self.outline.parameters():
            if parameter.ndim == 3:  # experts of a mixture-of-experts layer, in one tensor
                chosen = getattr(self.config, "num_experts_per_tok", None) or len(parameter)
                flops += 2.0 * parameter.numel() * chosen / len(parameter) * length
        moved = MOVED * (2 if self.half else 4) * self.per_token(length, lambda i, o: i + o)
        cache = 0.0 if context is None else context * self.kv_bytes
        weights = float(self.parameters * self.item)
        return Work(batch * flops, weights + batch * (moved + cache), CALLS * len(list(self.outline.modules())))

    def step(self, batch: int, length: int) -> Work:
        """Forward and backward pass of a micro-batch."""
        once, own = self.forward(batch, length), 2.0 * batch * length * self.adapter_parameters
        passes = (3.0 if self.adapter is None else 2.0) + self.checkpointing
        return replace(once, flops=once.flops * passes + own, bytes=once.bytes * passes / 2)

    def activations(self, batch: int, length: int, *, training: bool = True) -> float:
        """Bytes that are alive when a backward pass begins, or of one layer of a forward pass."""
        cast, layers = self.bf16 and self.item == 4, int(self.config.num_hidden_layers)
        item = 3.0 if cast else float(self.item)  # under autocast norms and residuals stay in float32
        saved = SAVED * item * self.per_token(length, lambda i, o: 0.0 if o == self.config.vocab_size else i + o)
        if self.checkpointing or not training:
            saved /= layers
        if self.checkpointing:
            saved += item * layers * int(self.config.hidden_size) * length
        logits = LOGITS * 4.0 * int(self.config.vocab_size) * self.predicted(length)
        return batch * (saved + logits) + 2.0 * self.parameters * cast

    # -- models -----------------------------------------------------------------------------------------------------

    def shallow(self, layers: int) -> Counted:
        """The same model with fewer layers, on either side of an encoder-decoder."""
        config = copy.deepcopy(self.config)
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = list(config.layer_types[:layers])
        for key in ("num_hidden_layers", "num_decoder_layers", "decoder_layers"):
            if hasattr(config, key):
                setattr(config, key, layers)
        return replace(self, config=config)

    def build(self, device: str = "cpu") -> Any:
        """The model with random weights, its adapter put in."""
        config = copy.deepcopy(self.config)
        config.dtype = DTYPES[self.dtype]
        with torch.device(device), warnings.catch_warnings(action="ignore", category=FutureWarning):
            model = from_architecture(config)
            if self.checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                model.enable_input_require_grads()
            return model if self.adapter is None else with_lora(model, self.adapter)

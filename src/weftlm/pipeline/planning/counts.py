"""A model of a plan, on tensors without memory: its parameters, and the work of everything weftlm does with it.

Nothing here knows a formula of an architecture: the model is built from its configuration and run on shapes. A deep
model whose layers are all alike is run with one and with two of them, and every count taken along the straight line.

Two closed forms hold as checks (Kaplan et al. 2020, arXiv:2001.08361; Chowdhery et al. 2022, arXiv:2204.02311), N
parameters without the input embedding, L layers, H hidden size, T tokens:

    forward   2 N + 4 L H T  FLOPs per token (attention in full, also where it skips what is masked)
    training  three times that; with recomputed activations four times
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, DynamicCache, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from weftlm.errors import ConfigError, WeftError
from weftlm.experts.expert import BaseReference, LoRAExpert, LoRAFactors
from weftlm.experts.gate import attach_gates
from weftlm.experts.lora import module_widths
from weftlm.experts.low_rank import Rows
from weftlm.gating.experts import Backbone, label_log_probs
from weftlm.models.config import LoRASection, ModelConfig
from weftlm.models.factory import architecture_config, count_parameters, from_architecture, peft_warnings
from weftlm.models.hf import token_losses
from weftlm.models.lora_targets import ALL_LINEAR, lora_targets
from weftlm.models.open import DTYPES, pretrained_config
from weftlm.pipeline.planning.trace import Work, along, record, shapes_only
from weftlm.training.config import TrainingConfig
from weftlm.training.loop import adamw

SHALLOW = (1, 2)
"""Layers a deep model is run with."""
DEEP = 2
"""More layers than this are not run one by one."""
TARGET_SHARE = 0.25
"""Tokens of a target over those of its prompt, for an encoder-decoder, where nothing is known of the examples."""


def model_config(section: ModelConfig, *, vocab_size: int | None, sequence_length: int) -> PretrainedConfig:
    """The configuration of a recipe's model, without its weights.

    Raises:
        ConfigError: as `pretrained_config` and `architecture_config`, the vocabulary is not known, or it is an
            encoder-decoder.
    """
    if section.pretrained is not None:
        config = pretrained_config(section.pretrained, section.revision)
        if config.is_encoder_decoder:
            raise ConfigError(
                f"model.pretrained {section.pretrained} is an encoder-decoder model, and a mixture trains decoder-only "
                "language models; an encoder-decoder can be the base of experts: experts.base"
            )
        return config
    if vocab_size is None:
        raise ConfigError(
            "the size of the vocabulary is not known before the tokenizer is there; prepare the data first, or give "
            "data.tokenizer.train.vocab_size or a local folder as data.tokenizer.pretrained"
        )
    return architecture_config(section, vocab_size=vocab_size, sequence_length=sequence_length, eos_id=0)


@dataclass(frozen=True)
class Sizes:
    """What formulas need of a model.

    Attributes:
        parameters: all of them, tied ones once.
        trainable: those that are trained.
        layers: L; of an encoder-decoder, those of both.
        largest_unit: parameters of the largest decoder layer, or of what is in no layer: what is gathered at a time
            where a model is split.
        kv_bytes: keys and values of one token in all layers that keep them.
        weight_bytes: of the parameters, as they are held.
        tensors: that are trained.
        modules: that hold trained parameters of their own.
        adapted: (input width, output width) of every linear module an adapter goes on.
    """

    parameters: int
    trainable: int
    layers: int
    largest_unit: int
    kv_bytes: float
    weight_bytes: int
    tensors: int
    modules: int
    adapted: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Counted:
    """A model that is counted on.

    An encoder-decoder reads `length` tokens of a prompt and predicts `share` times as many of a target.

    Args:
        config: of the model.
        dtype: parameters are held in.
        bf16: under bfloat16 autocast.
        checkpointing: activations are recomputed in the backward pass.
        adapter: train this adapter and nothing else.
        share: tokens of a target over those of its prompt, for an encoder-decoder.
    """

    config: PretrainedConfig
    dtype: str = "float32"
    bf16: bool = False
    checkpointing: bool = False
    adapter: LoRASection | None = None
    share: float = TARGET_SHARE
    _cache: dict[Any, Work] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def sizes(self) -> Sizes:
        """Parameters and widths of the whole model, which is built on the meta device."""
        with self._countable():
            return self._sizes()

    def _sizes(self) -> Sizes:
        model = self._on_meta(self.config, adapted=True)
        layers = _layers(model, self.config)
        inside = max((count_parameters(layer) for layer in layers), default=0)
        total = count_parameters(model)
        bare = self._on_meta(self.config, adapted=False)
        attending = getattr(self.config, "num_attention_heads", 0)
        heads = getattr(self.config, "num_key_value_heads", None) or attending
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // max(1, attending)
        item = 2 if self.bf16 else DTYPES[self.dtype].itemsize
        return Sizes(
            parameters=total,
            trainable=count_parameters(model, trainable=True),
            layers=sum(_depths(self.config)),
            largest_unit=max(inside, total - sum(count_parameters(layer) for layer in layers)),
            kv_bytes=2.0 * _depths(self.config)[-1] * heads * width * item,
            weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
            modules=sum(any(p.requires_grad for p in m.parameters(recurse=False)) for m in model.modules()),
            tensors=sum(p.requires_grad for p in model.parameters()),
            adapted=tuple(module_widths(bare.get_submodule(name)) for name in self._targets),
        )

    def outline(self) -> nn.Module:
        """The model on the meta device."""
        return self._on_meta(self.config, adapted=True)

    def bare_outline(self) -> nn.Module:
        """The model on the meta device, without its adapter."""
        with self._countable():
            return self._on_meta(self.config, adapted=False)

    # -- work ---------------------------------------------------------------------------------------------------

    def step(self, batch: int, length: int, *, accumulating: bool = False) -> Work:
        """Forward and backward of a micro-batch; `accumulating` onto gradients that are there."""

        def run(model: nn.Module) -> Work:
            losses = self._losses(model, batch, length)

            def once() -> None:
                with self._autocast():
                    loss = losses().mean()
                loss.backward()

            if accumulating:
                for parameter in model.parameters():
                    parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            return record(once)

        return self._counted(("step", batch, length, accumulating), run, train=True)

    def forward(self, batch: int, length: int) -> Work:
        """Losses of a batch, without gradient."""

        def run(model: nn.Module) -> Work:
            losses = self._losses(model, batch, length)
            with torch.no_grad(), self._autocast():
                return record(losses)

        return self._counted(("forward", batch, length), run)

    def activation_step(self, batch: int, length: int) -> Work:
        """Forward, and backward through the activations without the gradients of weights."""

        def run(model: nn.Module) -> Work:
            tokens = torch.zeros(batch, length + 1, dtype=torch.int64)
            embedded: list[Tensor] = []
            table = model.get_input_embeddings()  # type: ignore[operator]
            hook = table.register_forward_hook(lambda module, args, y: embedded.append(y))

            def once() -> Tensor:
                with self._autocast():
                    loss = token_losses(model, tokens).sum()
                return torch.autograd.grad(loss, embedded)[0]

            work = record(once)
            hook.remove()
            return work

        return self._counted(("activation step", batch, length), run, train=True)

    def prefill(self, batch: int, length: int) -> Work:
        """A prompt read into a cache of keys and values; the logits of the token after it alone."""

        def run(model: nn.Module) -> Work:
            tokens = torch.zeros(batch, length, dtype=torch.int64)
            with torch.no_grad(), self._autocast():
                if self.config.is_encoder_decoder:
                    return record(lambda: model(input_ids=tokens, decoder_input_ids=tokens[:, :1]).logits)
                cache = DynamicCache(config=_config_of(model))
                return record(
                    lambda: model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                )

        return self._counted(("prefill", batch, length), run)

    def decode(self, batch: int, context: int) -> Work:
        """One token of every sequence behind a cache of `context` tokens.

        Of an encoder-decoder: one token of the target, halfway through it, behind a prompt of `context` tokens.
        """

        def run(model: nn.Module) -> Work:
            tokens = torch.zeros(batch, max(1, context), dtype=torch.int64)
            with torch.no_grad(), self._autocast():
                if self.config.is_encoder_decoder:
                    said = tokens[:, : max(1, self.target(context) // 2)]
                    first = model(input_ids=tokens, decoder_input_ids=said, use_cache=True)
                    read, behind = (first.encoder_last_hidden_state,), first.past_key_values
                    return record(
                        lambda: (
                            model(
                                encoder_outputs=read,
                                decoder_input_ids=tokens[:, :1],
                                past_key_values=behind,
                                use_cache=True,
                            ).logits
                        )
                    )
                cache = DynamicCache(config=_config_of(model))
                model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                return record(lambda: model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True).logits)

        return self._counted(("decode", batch, context), run)

    def optimizer(self) -> Work:
        """Clipping and AdamW over all trained parameters, moments there already."""

        def run(model: nn.Module) -> Work:
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            optimizer = adamw(trained, TrainingConfig(steps=1))

            def once() -> None:
                nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()

            for parameter in trained.values():
                parameter.grad = torch.empty_like(parameter)
            once()
            return record(once)

        return self._counted(("optimizer",), run, train=True)

    def gate_step(self, batch: int, length: int) -> Work:
        """Forward and backward of a micro-batch that trains the gates of an adapter."""

        def run(model: nn.Module) -> Work:
            attach_gates(model, self._expert(model))
            losses = self._losses(model, batch, length)

            def once() -> None:
                with self._autocast():
                    loss = losses().mean()
                loss.backward()

            return record(once)

        return self._counted(("gate step", batch, length), run, adapted=False)

    def scored(self, experts: int, batch: int, length: int) -> Work:
        """One pass that scores a batch under so many adapters over this base at once."""

        def run(model: nn.Module) -> Work:
            backbone = self._backbone(model, experts)
            tokens = torch.zeros(batch, length + 1, dtype=torch.int64)
            rows = Rows(one=0) if experts == 1 else Rows(blocks=tuple(range(experts)))

            def once() -> list[Tensor]:
                logits = backbone.run(rows, tokens[:, :-1].repeat(experts, 1)).unflatten(0, (experts, -1))
                return [label_log_probs(each, tokens[:, 1:]) for each in logits]

            with torch.no_grad(), self._autocast():
                return record(once)

        return self._counted(("scored", experts, batch, length), run, adapted=False)

    def mixed(self, experts: int, batch: int, context: int, length: int = 1) -> Work:
        """`length` tokens of every sequence under so many experts over this base at once, behind `context` tokens.

        What a gate needs of each: the log-probabilities of every next token after every one of them.
        """

        def run(model: nn.Module) -> Work:
            backbone = self._backbone(model, experts)
            rows = Rows(one=0) if experts == 1 else Rows(blocks=tuple(range(experts)))
            tokens = torch.zeros(batch * experts, max(context, length), dtype=torch.int64)
            with torch.no_grad(), self._autocast():
                cache = DynamicCache(config=self.config)
                if context:
                    backbone.run(rows, tokens[:, :context], cache=cache)
                new = tokens[:, :length]
                return record(lambda: backbone.run(rows, new, cache=cache).float().log_softmax(dim=-1))

        return self._counted(("mixed", experts, batch, context, length), run, adapted=False)

    def drawn(self, batch: int, context: int) -> Work:
        """One token of every sequence drawn from one expert over this base, behind `context` tokens."""

        def run(model: nn.Module) -> Work:
            backbone = self._backbone(model, 1)
            tokens = torch.zeros(batch, max(1, context), dtype=torch.int64)
            u_B = torch.zeros(batch, 1, dtype=torch.float64)

            def once(cache: DynamicCache) -> Tensor:
                logits = backbone.run(Rows(one=0), tokens[:, :1], cache=cache)
                probs = torch.softmax(logits[:, -1].double(), dim=-1)
                cumulated = probs.cumsum(dim=-1)
                last = (probs > 0).flip(-1).to(torch.int64).argmax(dim=-1)
                return torch.minimum(torch.searchsorted(cumulated, u_B * cumulated[:, -1:], right=True)[:, 0], last)

            with torch.no_grad(), self._autocast():
                cache = DynamicCache(config=self.config)
                backbone.run(Rows(one=0), tokens, cache=cache)
                return record(lambda: once(cache))

        return self._counted(("drawn", batch, context), run, adapted=False)

    def shadow(self, batch: int, length: int) -> Work:
        """What a shadow probe adds to the backward pass of a micro-batch: each module's term, and its dot product.

        For a linear module the narrower of  grad y V  and  x V^T,  times the other side; 2 N FLOPs per token in all.
        """

        def run(model: nn.Module) -> Work:
            seen: list[tuple[nn.Module, Tensor, Tensor]] = []

            def note(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
                if isinstance(y, Tensor) and args and any(p.requires_grad for p in module.parameters(recurse=False)):
                    seen.append((module, args[0], y))

            hooks = [module.register_forward_hook(note) for module in model.modules() if not any(module.children())]
            with torch.no_grad(), self._autocast():
                token_losses(model, torch.zeros(batch, length + 1, dtype=torch.int64))
            for hook in hooks:
                hook.remove()
            with torch.no_grad():
                return record(lambda: [_shadow_term(*each) for each in seen])

        return self._counted(("shadow", batch, length), run, train=True)

    def passes_over_parameters(self, *, products: int, copies: int) -> Work:
        """Dot products with a direction and scaled copies, over all trained parameters."""

        def run(model: nn.Module) -> Work:
            trained = [p.detach() for p in model.parameters() if p.requires_grad]
            others = [torch.empty_like(p) for p in trained]

            def once() -> None:
                for _ in range(products):
                    for p, v in zip(trained, others, strict=True):
                        (p * v).sum()
                for _ in range(copies):
                    for p, v in zip(trained, others, strict=True):
                        p.copy_(p + 1e-3 * v)

            return record(once)

        return self._counted(("over parameters", products, copies), run, train=True)

    # -- how it is counted --------------------------------------------------------------------------------------

    def predicted(self, length: int) -> int:
        """Tokens of a sequence that are predicted: all it reads, or an encoder-decoder's target."""
        return self.target(length) if self.config.is_encoder_decoder else length

    def target(self, length: int) -> int:
        """Tokens of a target behind a prompt of so many, for an encoder-decoder."""
        return max(1, round(self.share * length))

    def _losses(self, model: nn.Module, batch: int, length: int) -> Callable[[], Tensor]:
        """The losses of a batch, as training and evaluation work them out."""
        if not self.config.is_encoder_decoder:
            tokens_BT1 = torch.zeros(batch, length + 1, dtype=torch.int64)
            return lambda: token_losses(model, tokens_BT1)
        prompt_BT = torch.zeros(batch, length, dtype=torch.int64)
        labels_BC = torch.zeros(batch, self.target(length), dtype=torch.int64)
        arguments = {"input_ids": prompt_BT, "attention_mask": torch.ones_like(prompt_BT), "labels": labels_BC}

        def losses() -> Tensor:
            logits_BCV: Tensor = model(**arguments, use_cache=False).logits
            return -logits_BCV.float().log_softmax(dim=-1).gather(-1, labels_BC[..., None])[..., 0]

        return losses

    def _counted(
        self, key: Any, run: Callable[[nn.Module], Work], *, train: bool = False, adapted: bool = True
    ) -> Work:
        if key not in self._cache:
            with self._countable():
                self._cache[key] = self._run(run, train=train, adapted=adapted)
        return self._cache[key]

    def _run(self, run: Callable[[nn.Module], Work], *, train: bool, adapted: bool) -> Work:
        if self.adapter is not None:
            _ = self._targets  # kept from here on: no further model can be put on the meta device among shapes
        layers = int(self.config.num_hidden_layers)
        found = []
        for depth in SHALLOW if layers > DEEP and self._alike else (layers,):
            config = self.config if depth == layers else _with_layers(self.config, depth)
            model = self._on_meta(config, adapted=adapted)
            with shapes_only():
                _give_shapes(model)
                model.train(train)
                if self.checkpointing and train:
                    _checkpoint(model, self.adapter is not None)
                found.append(run(model))
        low, high = SHALLOW
        place = (layers - low) / (high - low)
        return found[0] if len(found) == 1 else along(found[0], found[1], place)

    @contextmanager
    def _countable(self) -> Iterator[None]:
        """Whatever a model of some architecture fails with on shapes becomes an error with its name."""
        try:
            yield
        except WeftError:
            raise
        except Exception as error:
            why = next(iter(str(error).strip().splitlines()), "no message")
            raise ConfigError(
                f"a {self.config.model_type} model cannot be counted on shapes ({type(error).__name__}: {why:.160}); "
                "plan with a model of another architecture and about its size in its place"
            ) from error

    @cached_property
    def _alike(self) -> bool:
        """Whether all layers are alike, so that fewer tell about all; of an encoder-decoder, those behind the first."""
        kinds, depths = getattr(self.config, "layer_types", None), _depths(self.config)
        if (kinds is not None and len(set(kinds)) > 1) or len(set(depths)) > 1:
            return False
        outlines = [_outline(layer) for layer in _layers(self._on_meta(self.config, adapted=False), self.config)]
        if self.config.is_encoder_decoder:
            parts = outlines[1 : depths[0]], outlines[depths[0] + 1 :]
            return len(outlines) == sum(depths) and all(len(set(part)) == 1 for part in parts)
        return len(set(outlines)) == 1

    @cached_property
    def _targets(self) -> list[str]:
        """Linear modules an adapter goes on, in the model with all its layers: those it names, or all but the head."""
        named = ALL_LINEAR if self.adapter is None else self.adapter.target_modules
        return lora_targets(self._on_meta(self.config, adapted=False), named)

    def _on_meta(self, config: PretrainedConfig, *, adapted: bool) -> nn.Module:
        dropping = [key for key in config.to_dict() if key.endswith("layerdrop")]
        if any(getattr(config, key) for key in dropping):  # which layers are left out is drawn, and shapes draw nothing
            config = copy.deepcopy(config)
            for key in dropping:
                setattr(config, key, 0.0)
        with torch.device("meta"):
            seq2seq = config.is_encoder_decoder
            model: nn.Module = AutoModelForSeq2SeqLM.from_config(config) if seq2seq else from_architecture(config)
        model = model.to(DTYPES[self.dtype])
        if not adapted or self.adapter is None:
            return model
        there = dict(model.named_modules())
        section = LoraConfig(
            r=self.adapter.rank, lora_alpha=self.adapter.alpha,
            target_modules=[name for name in self._targets if name in there], lora_dropout=self.adapter.dropout,
            task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        )  # fmt: skip
        with peft_warnings():
            return get_peft_model(model, section)

    def _expert(self, model: nn.Module) -> LoRAExpert:
        assert self.adapter is not None
        rank, modules = self.adapter.rank, {}
        for name, module in model.named_modules():
            if name in self._targets:
                inputs, outputs = module_widths(module)
                modules[name] = LoRAFactors(torch.empty(rank, inputs), torch.empty(outputs, rank), 1.0)
        return LoRAExpert("counted", BaseReference("counted"), modules, {})

    def _backbone(self, model: nn.Module, experts: int) -> Backbone:
        loras = [None if self.adapter is None else self._expert(model) for _ in range(experts)]
        return Backbone(model, range(experts), loras)  # type: ignore[arg-type]

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            yield


def _config_of(model: nn.Module) -> PretrainedConfig:
    config = model.config
    assert isinstance(config, PretrainedConfig)
    return config


def _with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    fewer = copy.deepcopy(config)
    kinds = getattr(fewer, "layer_types", None)
    if kinds is not None:
        fewer.layer_types = list(kinds[:layers])
    fewer.num_hidden_layers = layers
    if fewer.is_encoder_decoder and (key := _decoder_depth(fewer)) is not None:
        setattr(fewer, key, layers)
    return fewer


def _decoder_depth(config: PretrainedConfig) -> str | None:
    """The key of an encoder-decoder's configuration that tells the depth of its decoder."""
    return next((key for key in ("num_decoder_layers", "decoder_layers") if hasattr(config, key)), None)


def _depths(config: PretrainedConfig) -> tuple[int, ...]:
    """Layers of a decoder; of an encoder-decoder, of its encoder and of its decoder."""
    layers = int(config.num_hidden_layers)
    if not config.is_encoder_decoder:
        return (layers,)
    key = _decoder_depth(config)
    return layers, layers if key is None else int(getattr(config, key))


def _layers(model: nn.Module, config: PretrainedConfig) -> list[nn.Module]:
    """The decoder layers, an encoder's before them: of each part the first list of modules of that length."""
    whole: Any = model
    parts = [whole.get_encoder(), whole.get_decoder()] if config.is_encoder_decoder else [model]
    found: list[nn.Module] = []
    for part, count in zip(parts, _depths(config), strict=True):
        lists = (module for module in part.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
        found += next(lists, nn.ModuleList())
    return found


def _outline(module: nn.Module) -> tuple[Any, ...]:
    return tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _give_shapes(model: nn.Module) -> None:
    """Parameters and buffers on the meta device become tensors that have a device and no memory; ties stay."""
    known: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    known[id(tensor)] = (
                        nn.Parameter(empty, requires_grad=tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else empty
                    )
                table[name] = known[id(tensor)]  # type: ignore[assignment]


def _checkpoint(model: nn.Module, adapted: bool) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="`gradient_checkpointing_enable` is deprecated", category=FutureWarning
        )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    if adapted:
        model.enable_input_require_grads()  # type: ignore[operator]


def _shadow_term(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    grad = torch.empty_like(y)
    if isinstance(module, nn.Linear | Conv1D):
        weight = module.weight.detach()
        v_OI = torch.empty_like(weight).t() if isinstance(module, Conv1D) else torch.empty_like(weight)
        v_OI = v_OI.to(y.dtype)
        if v_OI.shape[0] >= v_OI.shape[1]:
            return ((grad @ v_OI) * x).reshape(len(y), -1).sum(1)
        return (grad * (x @ v_OI.t())).reshape(len(y), -1).sum(1)
    if isinstance(module, nn.Embedding):
        return (torch.nn.functional.embedding(x, module.weight.detach()) * grad).reshape(len(x), -1).sum(1)
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return (grad.float() * normalised).reshape(len(y), -1, y.shape[-1]).sum(1) @ torch.empty(y.shape[-1])

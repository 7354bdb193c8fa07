"""Counting work without doing it: a model runs on tensors that have shapes and no memory, and operations are noted.

Nothing here knows a formula of an architecture: the model is built from its configuration and run on fake tensors. A
model whose layers are alike is run with one and with two of them, and every count taken along the straight line. Two
closed forms hold as checks (Kaplan et al. 2020, arXiv:2001.08361; Chowdhery et al. 2022, arXiv:2204.02311), for N
parameters without the input embedding, L layers, H hidden size, T tokens:

    forward   2 N + 4 L H T  FLOPs per token (attention in full, also where it skips what is masked)
    training  three times that; with recomputed activations four times
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForSeq2SeqLM, DynamicCache, PretrainedConfig, masking_utils
from transformers.pytorch_utils import Conv1D

from weftlm.errors import ConfigError, WeftError, reason
from weftlm.models.config import LoRASection
from weftlm.models.factory import count_parameters, from_architecture, peft_warnings
from weftlm.models.hf import token_losses
from weftlm.models.lora_targets import linear_widths, lora_targets
from weftlm.models.open import DTYPES
from weftlm.training.parallel import decoder_layers

SHALLOW = (1, 2)
"""Numbers of layers that a model of more layers is run with."""
TARGET_SHARE = 0.25
"""Target tokens of an example over its prompt tokens, for encoder-decoders; an assumption."""


@dataclass(frozen=True)
class Work:
    """Counts of a piece of a program, which do not depend on the machine.

    Attributes:
        flops: floating-point operations of matrix products and attention, 2 per multiply-add.
        bytes: bytes read and written by operations that move data.
        calls: number of operations that move data, which is the number of kernel launches.
        peak: largest number of bytes alive beyond those alive before.
        kept: bytes alive at the end beyond those alive before.
    """

    flops: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0
    peak: float = 0.0
    kept: float = 0.0

    def along(self, other: Work, place: float) -> Work:
        """A straight line through this work at 0 and another at 1, for counts that grow equally with each layer."""
        names = self.__dataclass_fields__
        first, second = ([getattr(work, name) for name in names] for work in (self, other))
        return Work(*(max(0.0, a + place * (b - a)) for a, b in zip(first, second, strict=True)))


@dataclass(frozen=True)
class Sizes:
    """Parameters and widths of a model.

    Attributes:
        parameters: number of parameters, tied ones once.
        trainable: number of trained parameters.
        tensors: number of trained tensors.
        weight_bytes: bytes of all parameters as they are held.
        largest_unit: parameters of the largest decoder layer, or of everything outside the layers: what FSDP2 gathers.
        kv_bytes: bytes of the keys and values of one token in all layers.
        adapted: (input width, output width) of every target module of the adapter.
    """

    parameters: int
    trainable: int
    tensors: int
    weight_bytes: int
    largest_unit: int
    kv_bytes: float
    adapted: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Counted:
    """A model whose work is counted.

    An encoder-decoder reads a prompt of `length` tokens and predicts `TARGET_SHARE` times as many of a target.

    Attributes:
        config: configuration of the model.
        dtype: type the parameters are held in.
        bf16: whether it runs under bfloat16 autocast.
        checkpointing: whether the backward pass recomputes activations.
        adapter: the adapter that is trained; absent: all parameters are.
    """

    config: PretrainedConfig
    dtype: str = "float32"
    bf16: bool = False
    checkpointing: bool = False
    adapter: LoRASection | None = None
    _works: dict[Any, Work] = field(default_factory=dict, repr=False, compare=False)

    def like(self, **changes: Any) -> Counted:
        """The same model under other settings."""
        return replace(self, **changes, _works={})

    @cached_property
    def outline(self) -> nn.Module:
        """The bare model with all its layers on the meta device.

        Raises:
            ConfigError: the configuration is of no language model.
        """
        with self._named_errors(), torch.device("meta"):
            return self._bare(self.config)

    @cached_property
    def targets(self) -> list[str]:
        """Names of the adapter's target modules; none without an adapter."""
        return [] if self.adapter is None else lora_targets(self.outline, self.adapter.target_modules)

    @cached_property
    def sizes(self) -> Sizes:
        """Parameters and widths of the model, with the adapter where it has one."""
        config, model = self.config, self.outline
        item = 2 if self.bf16 else DTYPES[self.dtype].itemsize
        total = count_parameters(model)
        inside = [count_parameters(layer) for layer in decoder_layers(model)]
        adapted = tuple(linear_widths(model.get_submodule(name)) or (0, 0) for name in self.targets)
        added = sum(self.adapter.rank * (i + o) for i, o in adapted) if self.adapter is not None else 0
        heads = getattr(config, "num_attention_heads", 0)
        width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
        layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
        return Sizes(
            parameters=total + added,
            trainable=added if self.adapter is not None else total,
            tensors=2 * len(adapted) if self.adapter is not None else len(list(model.parameters())),
            weight_bytes=(total + added) * DTYPES[self.dtype].itemsize,
            largest_unit=max([total - sum(inside), *inside]),
            kv_bytes=2.0 * layers * (getattr(config, "num_key_value_heads", None) or heads) * width * item,
            adapted=adapted,
        )

    # -- work -------------------------------------------------------------------------------------------------------

    def step(self, batch: int, length: int, *, accumulating: bool = False) -> Work:
        """Forward and backward pass of a micro-batch; `accumulating` onto gradients that exist already."""

        def run(model: nn.Module) -> Work:
            model.train()
            if self.checkpointing:
                checkpoint(model)
            for parameter in model.parameters() if accumulating else ():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            return record(lambda: self.losses(model, batch, length).mean().backward())

        return self._counted(("step", batch, length, accumulating), run)

    def forward(self, batch: int, length: int) -> Work:
        """Losses of a batch, without gradients."""

        def run(model: nn.Module) -> Work:
            with torch.no_grad():
                return record(lambda: self.losses(model, batch, length))

        return self._counted(("forward", batch, length), run)

    def decode(self, batch: int, context: int) -> Work:
        """One token of every sequence behind a cache of `context` tokens, by a decoder-only model."""

        def run(model: nn.Module) -> Work:
            tokens = torch.zeros(batch, max(1, context), dtype=torch.int64)
            cache = DynamicCache(config=self.config)
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
                model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                return record(lambda: model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True).logits)

        return self._counted(("decode", batch, context), run)

    def losses(self, model: nn.Module, batch: int, length: int) -> Tensor:
        """Losses of a batch as training and evaluation compute them."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            if not self.config.is_encoder_decoder:
                return token_losses(model, torch.zeros(batch, length + 1, dtype=torch.int64))
            prompt_BT = torch.zeros(batch, length, dtype=torch.int64)
            labels_BC = torch.zeros(batch, self.predicted(length), dtype=torch.int64)
            logits_BCV: Tensor = model(input_ids=prompt_BT, labels=labels_BC, use_cache=False).logits
            return -logits_BCV.float().log_softmax(dim=-1).gather(-1, labels_BC[..., None])[..., 0]

    def predicted(self, length: int) -> int:
        """Tokens of a sequence that are predicted: all of them, or the target's."""
        return max(1, round(TARGET_SHARE * length)) if self.config.is_encoder_decoder else length

    # -- models -----------------------------------------------------------------------------------------------------

    def build(self, layers: int | None = None) -> nn.Module:
        """The model with random weights on the default device, its adapter put in; `layers`: fewer layers."""
        model = self._bare(self.config if layers is None else self.shallow(layers).config)
        if self.adapter is None:
            return model
        there = dict(model.named_modules())
        section = LoraConfig(
            r=self.adapter.rank, lora_alpha=self.adapter.alpha, lora_dropout=self.adapter.dropout,
            target_modules=[name for name in self.targets if name in there],
            task_type="SEQ_2_SEQ_LM" if self.config.is_encoder_decoder else "CAUSAL_LM",
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in there.values()),
        )  # fmt: skip
        with peft_warnings():
            return get_peft_model(model, section)

    def shallow(self, layers: int) -> Counted:
        """The same model with fewer layers, on either side of an encoder-decoder."""
        config = copy.deepcopy(self.config)
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = list(config.layer_types[:layers])
        config.num_hidden_layers = layers
        for key in ("num_decoder_layers", "decoder_layers"):
            if config.is_encoder_decoder and hasattr(config, key):
                setattr(config, key, layers)
        return self.like(config=config)

    def _bare(self, config: PretrainedConfig) -> nn.Module:
        config = copy.deepcopy(config)
        config.dtype = DTYPES[self.dtype]
        for key in config.to_dict():
            if key.endswith("layerdrop"):  # layers left out at random cannot be counted
                setattr(config, key, 0.0)
        kind: Any = AutoModelForSeq2SeqLM.from_config if config.is_encoder_decoder else from_architecture
        model: nn.Module = kind(config)
        return model

    @cached_property
    def _regular(self) -> bool:
        """Whether layers beyond the first are alike, so that two of them tell about all."""
        config, layers = self.config, decoder_layers(self.outline)
        kinds = set(getattr(config, "layer_types", None) or ())
        stacks = [layers]
        if config.is_encoder_decoder:
            half = int(config.num_hidden_layers)
            stacks = [layers[:half], layers[half:]]
        shapes = [[[(name, p.shape) for name, p in layer.named_parameters()] for layer in stack] for stack in stacks]
        depth = int(config.num_hidden_layers)
        return len(kinds) <= 1 and all(len(s) == depth and all(each == s[1] for each in s[1:]) for s in shapes)

    def _counted(self, key: Any, run: Callable[[nn.Module], Work]) -> Work:
        if key not in self._works:
            depth = int(self.config.num_hidden_layers)
            _ = self.targets  # before tensors become fake
            with self._named_errors():
                if depth <= SHALLOW[-1] or not self._regular:
                    self._works[key] = self._on_shapes(run, None)
                else:
                    few, more = (self._on_shapes(run, layers) for layers in SHALLOW)
                    self._works[key] = few.along(more, (depth - SHALLOW[0]) / (SHALLOW[1] - SHALLOW[0]))
        return self._works[key]

    def _on_shapes(self, run: Callable[[nn.Module], Work], layers: int | None) -> Work:
        with torch.device("meta"):  # PEFT cannot work on fake tensors
            model = self.build(layers)
        with shapes_only():
            _off_meta(model)
            return run(model.eval())

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except WeftError:
            raise
        except Exception as error:
            raise ConfigError(
                f"a {self.config.model_type} model cannot be counted on shapes ({reason(error)}); "
                "plan with a model of another architecture and about its size in its place"
            ) from error


def _off_meta(model: nn.Module) -> None:
    """Put empty tensors in the place of those on the meta device; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
                if tensor is not None:
                    table[name] = made[id(tensor)]  # type: ignore[assignment]


def checkpoint(model: Any) -> None:
    """Have a model recompute its activations in the backward pass."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # transformers renames it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()


@contextmanager
def shapes_only() -> Iterator[None]:
    """In this context tensors have shapes and take no memory; models are built and run on them.

    transformers reads the values of position ids to find packed sequences; fake tensors have none, and none are packed.
    """
    known = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        masking_utils.find_packed_sequence_indices = known


def record(run: Callable[[], Any]) -> Work:
    """Run something and note what it does; in `shapes_only`, without doing it."""
    with _Recorder() as recorder:
        kept = run()
    work = Work(recorder.flops, recorder.bytes, recorder.calls, float(recorder.peak), float(recorder.alive))
    del kept
    return work


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.bytes = self.calls = 0.0
        self.alive = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs, outputs = (
            [leaf for leaf in tree_leaves(part) if isinstance(leaf, Tensor)] for part in ((args, kwargs), result)
        )
        there = {tensor.untyped_storage()._cdata for tensor in inputs}
        storages = [tensor.untyped_storage() for tensor in outputs]
        fresh = {storage._cdata: storage for storage in storages if storage._cdata not in there}
        moves = bool(fresh) or not outputs or function._schema.is_mutable
        if function.namespace == "prim" or function.is_view or not moves:
            return result
        self.calls += 1
        self.flops += _flops(function, args, kwargs or {}, result)
        self.bytes += sum(min(each.nbytes, each.untyped_storage().nbytes()) for each in (*inputs, *outputs))
        for storage in fresh.values():
            if storage in self.known:
                continue
            self.known.add(storage)
            self.alive += storage.nbytes()
            weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def _forget(self, size: int) -> None:
        self.alive -= size


def _flops(function: Any, args: Any, kwargs: Any, result: Any) -> float:
    """2 per multiply-add; attention in full, also where it skips what is masked, as is the custom."""
    packet = function._overloadpacket
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=result))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return float(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return float(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    return 0.0

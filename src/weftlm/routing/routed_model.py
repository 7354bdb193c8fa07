"""A base model, a pool of experts and a router as one Hugging Face model."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weftlm.config import Section, validate
from weftlm.errors import ConfigError, ExpertError, reason
from weftlm.experts.expert import BaseReference, Expert, base_name
from weftlm.experts.fold import folded_weight
from weftlm.experts.library import ExpertLibrary
from weftlm.experts.lora import check_fits
from weftlm.experts.low_rank import placement
from weftlm.files import check_sealed, parse_json, whole_folder
from weftlm.models.device import choose_device
from weftlm.models.fingerprint import base_fingerprint
from weftlm.models.hf import UPLOAD, save_options
from weftlm.models.lora_targets import linear_widths
from weftlm.models.open import Stepping, keeps_cache, load_base
from weftlm.models.prompted import is_encoder_decoder
from weftlm.routing.calls import arguments_of, decoder_call, encoder_call, encoder_decoder_call, remember
from weftlm.routing.config import MANIFEST, RouterConfig
from weftlm.routing.pool import ModulePool, Switch
from weftlm.routing.router import Call, Router, Routing, TargetModule, build_router
from weftlm.routing.trace import Trace, traces_of

log = logging.getLogger(__name__)

FORMAT = "weftlm routed model 1"
EXPERTS, BASE = "experts", "base"
_PROMPTS = ("inputs", "input_ids", "inputs_embeds")
"""Arguments of `generate` that hold the prompt."""
_FINGERPRINTED = {"torch.float32", "torch.bfloat16", "torch.float64"}
"""Dtypes in which a base has one fingerprint."""
_ENCODER = re.compile(r"(^|\.)encoder\.|(EncDecAttention|encoder_attn|crossattention)\.(k|v|k_proj|v_proj|key|value)$")

_OF_BASE = frozenset(
    "activation_checkpointing_disable base_model base_model_prefix can_generate compute_transition_scores config "
    "disable_input_require_grads dummy_inputs enable_input_require_grads generation_config get_decoder get_encoder "
    "get_input_embeddings get_output_embeddings get_position_embeddings gradient_checkpointing_disable hf_device_map "
    "is_backend_compatible is_loaded_in_4bit is_loaded_in_8bit is_quantized loss_function main_input_name name_or_path "
    "prepare_inputs_for_generation set_attn_implementation warn_if_padding_and_no_attention_mask".split()
)
"""Attributes of the base that hold for the routed model as they are."""

_INSTEAD = (
    "it is the base's, which knows nothing of the experts. To save or upload the routed model, "
    f"{UPLOAD}; to change the base, do it before the experts are routed over (base = routed.unload()); to use the base "
    "alone, call .model."
)
"""What to do in place of attributes of the base that are not passed on; the attribute's name follows."""


class NotRoutedError(ConfigError, AttributeError):
    """An attribute of the base that would leave the experts out was asked of a routed model."""


class _BaseEntry(Section):
    """Where the base of a saved routed model is."""

    name: str
    revision: str | None
    copied: bool


class _Manifest(Section):
    """What `routed.json` holds."""

    format: str
    base: _BaseEntry
    fingerprint: str | None
    dtype: str
    router: dict[str, Any]
    experts: list[str]


class RoutedModel(nn.Module):
    """A frozen base model whose adapted modules ask a router for the experts of every token.

        y = W u + sum_k p_k scale_k B_k A_k u

    `forward` and `generate` (KV cache, beams, left and right padding) take what the base's take. The base's inner model
    and its encoder and decoder are routed too, bit for bit, when they are called alone (fused losses, embeddings). Of
    the base's other attributes those in `_OF_BASE` are passed on; what would save or change the base alone is refused.

    The experts' factors are stacked once, here; a forward pass stacks nothing. Several threads may run passes at once,
    as on the base.

    Args:
        model: Base model; its adapted modules are replaced in place, and put back by `unload`.
        experts: Pool of experts, whose adapters may differ in rank, scale and the modules they adapt.
        router: Name or section of a router.
        base: Reference by which the base can be loaded, for `save_pretrained`.

    Raises:
        ConfigError: the router's section is wrong, it cannot serve an encoder-decoder model, or the base is routed
            already.
        ExpertError: an expert was made for another base, or lacks what the router reads.
    """

    accepts_routing_mask = True

    def __init__(
        self,
        model: PreTrainedModel,
        experts: Sequence[Expert],
        router: Mapping[str, Any] | RouterConfig | str = "phatgoose",
        *,
        base: BaseReference | None = None,
    ) -> None:
        super().__init__()
        if not experts:
            raise ExpertError("a routed model needs at least one expert; the pool is empty")
        if len({expert.name for expert in experts}) < len(experts):
            raise ExpertError(f"experts of a pool need different names; got {[expert.name for expert in experts]}")
        if any(isinstance(module, ModulePool) for module in model.modules()):
            raise ConfigError("the base model is routed already; call unload() on that routed model, or use_router")
        comparable = any(expert.lora.base.fingerprint for expert in experts) and not _coarse_dtypes(model)
        found = base_fingerprint(model) if comparable else None
        for expert in experts:
            check_fits(expert.lora, model, fingerprint=found)
        self.experts = tuple(experts)
        self.left_out: Mapping[str, str] = {}
        self.base_reference = base if base is not None else BaseReference(getattr(model.config, "_name_or_path", ""))
        self.targets = _targets(model, experts)
        # Weights are never trained here: the pool and the router are buffers, and the base stays as it came.
        self.model = model
        built = self._build(router)
        self.switch = Switch(built)
        self._pools = list[ModulePool]()
        for target in self.targets:
            module = model.get_submodule(target.name)
            adapters = [experts[place].lora.modules[target.name] for place in target.experts]
            pool = ModulePool(target, adapters, len(experts), *placement(module, model.dtype))
            pool.install(module, self.switch)
            self._pools.append(pool)
        self._hooks = self._install_hooks()
        self.use_router(built)

    # -- making one ---------------------------------------------------------------------------------------------

    @classmethod
    def from_library(
        cls,
        base: str | Path | PreTrainedModel | None,
        library: str | Path | ExpertLibrary,
        router: Mapping[str, Any] | RouterConfig | str = "phatgoose",
        *,
        experts: Sequence[str] | None = None,
        revision: str | None = None,
        dtype: str = "float32",
        device: torch.device | str | None = None,
    ) -> Self:
        """Route over the experts of a library.

        A base in float16 or quantised has another fingerprint than the same base in float32; it is taken with a
        warning.

        Args:
            base: Folder, hub name or model in memory; None for the base that the library names, in its revision.
            library: Library or its folder.
            router: Name or section of a router.
            experts: Names of the experts to use, where one that is broken or of another base is an error; None for all,
                where it is left out with a warning (`left_out`).
            revision, dtype: Hub revision and dtype of a base that is loaded.
            device: Device of the routed model; None for that of the base.
        Raises:
            ConfigError, ExpertError: as the class.
        """
        opened = library if isinstance(library, ExpertLibrary) else ExpertLibrary.open(Path(library))
        if base is None:
            base, revision = opened.base.name, opened.base.revision
        model = base if isinstance(base, PreTrainedModel) else load_base(str(base), revision=revision, dtype=dtype)
        reference = opened.base
        if not isinstance(base, PreTrainedModel):
            reference = BaseReference(base_name(str(base)), revision, opened.base.fingerprint)
        known, coarse = opened.base.fingerprint, _coarse_dtypes(model)
        found = None if known is None else base_fingerprint(model)
        if coarse and found != known:
            log.warning(
                "the base is held in %s, which leaves nothing to compare with the fingerprint of %s that the library "
                "%s was made for; make sure that it is that model",
                *(", ".join(sorted(coarse)), opened.base.name, opened.folder),
            )
        names = None if experts is None else [opened.named(name) for name in experts]
        chosen, left_out = opened.load_all(names, model=model, fingerprint=None if coarse else found)
        if left_out and (names is not None or not chosen):
            others = f"; can be used: {', '.join(expert.name for expert in chosen)}" if chosen else ""
            raise ExpertError(
                f"{len(left_out)} of {len(left_out) + len(chosen)} experts cannot be used "
                f"({'; '.join(left_out.values())}){others}"
            )
        for name, why in left_out.items():
            log.warning("expert %r is left out: %s", name, why)
        routed = cls(model, chosen, router, base=reference)
        routed.left_out = left_out
        return routed if device is None else routed.to(choose_device(str(device)))

    def use_router(self, router: Mapping[str, Any] | RouterConfig | str | Router) -> None:
        """Route by another router over the same pool; nothing is stacked again.

        Raises:
            ConfigError, ExpertError: as the class.
        """
        self._check_routed()
        built = router if isinstance(router, Router) else self._build(router)
        built.to(self.device)
        static_E = built.static_weights_E
        for pool in self._pools:
            pool.set_background(built.background_rank)
            pool.folded = None if static_E is None else folded_weight(pool.base, pool.dense_delta(static_E))
        self.router = self.switch.router = built

    def _build(self, router: Mapping[str, Any] | RouterConfig | str) -> Router:
        built = build_router(router, self.experts, self.targets)
        if is_encoder_decoder(self.model) and not built.supports_encoder_decoder:
            raise ConfigError(
                f"router {built.config.router!r} follows a text from left to right and serves decoder-only models"
            )
        return built

    def _check_routed(self) -> None:
        if not self._hooks:
            raise ConfigError("this routed model was unloaded; build another over the base and the experts")

    def unload(self) -> PreTrainedModel:
        """Take the experts out and give the base model back as it was; once is enough."""
        for pool in self._pools if self._hooks else ():
            pool.uninstall()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        return self.model

    # -- running it ---------------------------------------------------------------------------------------------

    def forward(self, *args: Any, routing_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The base model's forward, routed.

        Args:
            routing_mask: BT, True for the tokens that routers which decide once per sequence may read (a prompt and not
                its continuation); None for all.
        """
        self.switch.passing.decisive_BT = routing_mask
        try:
            return self.model(*args, **kwargs)
        finally:
            # also after KeyboardInterrupt, which passes hooks by
            self.switch.passing.decisive_BT = self.switch.passing.call = None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, routed; routers that decide once per sequence read the prompt alone."""
        prompt = args[0] if args else next((kwargs[key] for key in _PROMPTS if kwargs.get(key) is not None), None)
        if isinstance(prompt, Tensor) and prompt.dim() > 1 and not is_encoder_decoder(self.model):
            self.switch.passing.prompt_tokens = prompt.shape[1]
        if not is_encoder_decoder(self.model) and not self.keeps_cache:
            kwargs["use_cache"] = False
        try:
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]
        finally:
            self.switch.passing.prompt_tokens = self.switch.passing.call = None

    @property
    def keeps_cache(self) -> bool:
        """Whether the base reads a text on from its cache; one that does not reads it whole for every token."""
        with self.disabled():
            return keeps_cache(self.model)

    def stepper(self) -> Stepping:
        """How the model is stepped token by token; a router that decides once per text reads the prompt whole."""
        model: Any = self.model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        in_pieces = self.keeps_cache and not self.router.reads_ahead
        return Stepping((inner,), keeps_cache=self.keeps_cache, in_pieces=in_pieces, takes_prompt_mask=True)

    @contextmanager
    def disabled(self) -> Iterator[Self]:
        """The base model alone, bit for bit."""
        before = self.switch.enabled
        self.switch.enabled = False
        try:
            yield self
        finally:
            self.switch.enabled = before

    @contextmanager
    def recording(self, record: Callable[[TargetModule, Routing], None]) -> Iterator[Self]:
        """Call a function with module and routing of every decision of the passes run inside, in their order."""
        passing = self.switch.passing
        before, passing.record = passing.record, record
        try:
            yield self
        finally:
            passing.record = before

    def trace(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> list[Trace]:
        """Run the model once and give, for each sequence, the experts' weights on each token in each module.

        Of an encoder-decoder model, in the modules that read the encoder's tokens; the decoder needs no input.

        Raises:
            ConfigError: the router's weights are the same everywhere, so that there is nothing to trace.
        """
        if self.router.static_weights_E is not None:
            raise ConfigError(
                f"router {self.router.config.router!r} gives every token the same experts; there is nothing to trace"
            )
        seen: dict[str, Routing] = {}
        encoder = is_encoder_decoder(self.model)

        def record(target: TargetModule, routing: Routing) -> None:
            if target.reads_encoder or not encoder:
                seen[target.name] = routing

        if encoder and not any(key in kwargs for key in ("decoder_input_ids", "decoder_inputs_embeds", "labels")):
            starts = (self.model.config.decoder_start_token_id, self.model.config.pad_token_id, 0)
            start = next(token for token in starts if token is not None)
            kwargs["decoder_input_ids"] = torch.full_like(input_ids[:, :1], start)
        with self.recording(record), torch.inference_mode():
            self(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        real_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return traces_of(input_ids, real_BT.bool(), [expert.name for expert in self.experts], seen)

    def _install_hooks(self) -> list[Any]:
        """Hooks that begin and end a pass: on the model and on each part of it that is called alone."""
        model = self.model
        make: dict[nn.Module, Any] = {}
        if is_encoder_decoder(model):
            make = {model.get_encoder(): encoder_call, model.get_decoder(): encoder_decoder_call}
            make |= {model.base_model: encoder_decoder_call, model: encoder_decoder_call}
        else:
            make = dict.fromkeys((model, model.base_model, model.get_decoder()), decoder_call)
        found = []
        for module, call in make.items():
            # Methods and partials of them, not closures: `copy.deepcopy` gives a copy hooks of its own.
            found.append(module.register_forward_pre_hook(partial(self._begin, call), with_kwargs=True))
            found.append(module.register_forward_hook(self._end, with_kwargs=True, always_call=True))
        return found

    def _begin(self, make_call: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passing = self.switch.passing
        if passing.call is not None or not self.switch.enabled:
            return
        _refuse_checkpointing(module)
        call: Call = make_call(arguments_of(module.forward, args, kwargs), passing.decisive_BT)
        if passing.prompt_tokens is not None:  # without a cache `generate` gives what it wrote as well
            call.decisive_BT = call.decisive_BT.clone()
            call.decisive_BT[:, passing.prompt_tokens :] = False
        call.owner = module
        call.record = passing.record
        self.switch.begin(call)

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = self.switch.passing.call
        if call is not None and call.owner is module:
            self.switch.passing.call = None
            if output is not None:
                remember(call, output)

    # -- as a Hugging Face model --------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """The base's attributes that hold for the routed model too (`_OF_BASE`), and no others."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__"):
                raise
        if name in _OF_BASE:
            return getattr(self.model, name)
        if not hasattr(self.model, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}", name=name, obj=self)
        raise NotRoutedError(f"{type(self).__name__} has no {name!r}: {_INSTEAD}{name}")

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters of the base and of all experts' factors.

        Args:
            only_trainable: count parameters that require gradients; experts have none.
            exclude_embeddings: leave the base's embeddings out.
        """
        count: int = self.model.num_parameters(only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        return count if only_trainable else count + sum(expert.lora.num_parameters for expert in self.experts)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the base's parameters and of the experts' stacked factors.

        Args:
            return_buffers: count the base's other buffers and the router's too.
        """
        held: list[Tensor] = [*self.parameters()]
        if return_buffers:
            held += self.buffers()
        else:
            held += [factor for pool in self._pools for factor in (pool.A_ERI, pool.B_ERO)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def device(self) -> torch.device:
        """Of the base model."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base model."""
        return self.model.dtype

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, *, copy_base: bool = False, **kwargs: Any
    ) -> None:
        """Write the routed model: `routed.json`, the experts as a library, and on request the base.

        Args:
            save_directory: New or empty folder.
            is_main_process: Whether this process writes.
            copy_base: Whether the base model's weights are written too; else the base is loaded from where it came.
            kwargs: Further arguments of the base's `save_pretrained`, for its weights (`max_shard_size`).
        Raises:
            ConfigError: the folder is not empty, or an argument does not apply to a routed model.
        """
        options = save_options(kwargs)
        if is_main_process:
            with whole_folder(Path(save_directory), "routed model") as making:
                self._write(making, copy_base, options)

    def _write(self, folder: Path, copy_base: bool, options: Mapping[str, Any]) -> None:
        self._check_routed()
        base = self.base_reference
        adapters = [
            replace(each.lora, base=replace(base, fingerprint=each.lora.base.fingerprint or base.fingerprint))
            for each in self.experts
        ]
        experts = [replace(each, lora=lora) for each, lora in zip(self.experts, adapters, strict=True)]
        ExpertLibrary.open(folder / EXPERTS, base).add(*experts)
        if copy_base:
            self.model.save_pretrained(folder / BASE, **options)  # a pool keeps nothing among a model's saved tensors
        described = {
            "format": FORMAT,
            "base": {"name": base.name, "revision": base.revision, "copied": copy_base},
            "fingerprint": base.fingerprint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "router": self.router.config.model_dump(mode="json"),
            "experts": [expert.name for expert in self.experts],
        }
        (folder / MANIFEST).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        base: str | Path | PreTrainedModel | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load what `save_pretrained` wrote.

        Args:
            folder: Folder of the routed model.
            base: Another place to load the base from, or the base itself; None for where it came from.
            device: Device of the model; None for that of the base.
        Raises:
            ConfigError: the folder holds no routed model, or its base cannot be loaded.
            DataError: a file of the folder is missing or was altered.
            ExpertError: as the class.
        """
        folder = Path(folder)
        try:
            described = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{folder} holds no routed model ({MANIFEST}: {reason(error)}); build one first"
            ) from error
        if not isinstance(described, dict) or described.get("format") != FORMAT:
            raise ConfigError(f"{folder / MANIFEST} is not of the format {FORMAT!r}; build the routed model again")
        manifest = validate(_Manifest, described, str(folder / MANIFEST))
        check_sealed(folder, "build the routed model again")
        place = manifest.base
        if base is None:
            if not place.copied and not place.name:
                raise ConfigError(
                    f"{folder} does not say where its base is: it was built on a model without a name; give the base "
                    "(base=), or save the routed model with copy_base=True"
                )
            base = folder / BASE if place.copied else place.name
        return cls.from_library(
            base,
            folder / EXPERTS,
            manifest.router,
            experts=manifest.experts,
            revision=place.revision if str(base) == place.name else None,
            dtype=manifest.dtype,
            device=device,
        )


def _coarse_dtypes(model: nn.Module) -> set[str]:
    """Types of a model's parameters under which it has another fingerprint than in float32."""
    return {str(parameter.dtype) for parameter in model.parameters()} - _FINGERPRINTED


def _targets(model: nn.Module, experts: Sequence[Expert]) -> tuple[TargetModule, ...]:
    """The modules any expert adapts, in the model's order."""
    encoder_decoder = is_encoder_decoder(model)
    found: list[TargetModule] = []
    for name, module in model.named_modules():
        adapting = tuple(place for place, expert in enumerate(experts) if name in expert.lora.modules)
        if adapting:
            widths = linear_widths(module)
            assert widths is not None, name
            reads_encoder = encoder_decoder and _ENCODER.search(name) is not None
            found.append(TargetModule(name, len(found), adapting, widths[0], reads_encoder))
    return tuple(found)


def _refuse_checkpointing(model: nn.Module) -> None:
    """Recomputed layers would run after the pass, unrouted, and give gradients of another function.

    Raises:
        ConfigError: the model is training with gradient checkpointing.
    """
    if (
        torch.is_grad_enabled()
        and model.training
        and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    ):
        raise ConfigError(
            "a routed model cannot run its layers again in the backward pass; call gradient_checkpointing_disable(), "
            "or eval() where nothing of the base is trained"
        )

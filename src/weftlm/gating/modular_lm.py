"""Expert language models and a causal gate as one Hugging Face language model.

    log pi(v | x_<t) = logsumexp_e [ log gamma_e(x_<t) + log q_e(v | x_<t) ]        sum_e gamma_e(x_<t) = 1

so pi is normalised at every prefix. The first token of a sequence is context: the gate has seen nothing when it weighs
the experts for the second. How tokens are read on, by all experts or by few, is `modular_reader`'s. Adapters over one
base share its weights; keys and values they cannot share, since an adapter changes what every layer above it sees.

An example: experts 0 and 2 are adapters of one base (backbone 0), expert 1 is a whole model (backbone 1), and a batch
holds the sequences r and s. `_run` is asked for some rows of a backbone; a row is one expert on one sequence:

    row of backbone 0        0    1    2    3           row of backbone 1        0    1
    expert, sequence       0, r 0, s 2, r 2, s                                 1, r 1, s

A prompt takes one pass per backbone, of all rows. Where expert 2 alone is active on s, the next token takes row 3.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from weftlm.config import Section, validate
from weftlm.errors import ConfigError, reason
from weftlm.experts.expert import BaseReference, Expert
from weftlm.experts.library import ExpertLibrary
from weftlm.experts.low_rank import Rows
from weftlm.files import check_sealed, parse_json, whole_folder
from weftlm.gating.config import MANIFEST, REFRESH_EVERY, ExpertSource
from weftlm.gating.experts import ExpertPool, positions
from weftlm.gating.gate import CausalGate, Gate, load_gate, save_gate
from weftlm.gating.modular_cache import ModularCache, SlotWindow, rows_of
from weftlm.gating.modular_reader import ModularReader
from weftlm.models.fingerprint import base_fingerprint
from weftlm.models.hf import UPLOAD, save_options
from weftlm.models.open import Stepping

_PER_EXPERT = ("output_hidden_states", "output_attentions")
"""Arguments of `forward` that ask for what each expert has of its own."""

FORMAT = "weftlm modular model 1"
GATE, BASES, ADAPTERS = "gate.safetensors", "backbone", "adapters"


class ModularConfig(PretrainedConfig):
    """What transformers wants to know of a gated model.

    Attributes:
        top_m: Experts run per token; None for all.
        refresh_every: Tokens after which every expert catches up, at the latest; None for never.
    """

    model_type = "weftlm_modular"

    def __init__(
        self, vocab_size: int = 0, top_m: int | None = None, refresh_every: int | None = REFRESH_EVERY, **kwargs: Any
    ) -> None:
        self.vocab_size, self.top_m, self.refresh_every = vocab_size, top_m, refresh_every
        super().__init__(**kwargs)


class _Saved(Section):
    """What `modular.json` holds."""

    format: str
    dtype: str
    top_m: int | None
    refresh_every: int | None
    copied: bool
    experts: list[ExpertSource]


class ModularLM(PreTrainedModel, GenerationMixin):
    """A gated model: see the top of this file. Its logits are log-probabilities.

    Greedy decoding, sampling, beams and left padding work; assisted generation does not.

    Args:
        pool: Experts.
        gate: Causal gate over them.
        top_m: m; None: as the gate was trained (`prefix` with `top`), else all experts.
        refresh_every: Tokens between two catch-ups of every expert, at most; matters where `top_m` is below E.
    Raises:
        ConfigError: the gate is not causal or is over another number of experts, or a setting is out of range.
    """

    config_class = ModularConfig
    main_input_name = "input_ids"
    base_model_prefix = "pool"
    _is_stateful = True
    _supports_sdpa = True

    def __init__(
        self, pool: ExpertPool, gate: Gate, *, top_m: int | None = None, refresh_every: int | None = REFRESH_EVERY
    ) -> None:
        if not isinstance(gate, CausalGate):
            raise ConfigError(
                f"gate {gate.config.gate!r} looks at whole sequences, the future of a prefix included, and cannot "
                "predict a next token: distil it first (weftlm gate distil)"
            )
        if gate.experts != len(pool):
            raise ConfigError(f"a gate over {gate.experts} experts came with a pool of {len(pool)}; they must be equal")
        top_m = gate.top if top_m is None else top_m
        if top_m is not None and not 1 <= top_m <= len(pool):
            raise ConfigError(f"top_m is {top_m}; it must be from 1 to the {len(pool)} experts of the pool, or None")
        special = _special_tokens(pool)
        super().__init__(ModularConfig(pool.vocab_size, top_m, refresh_every, **special))
        self.generation_config = GenerationConfig(**special)
        self.pool = pool
        self.vocab_size = pool.vocab_size
        self._gate = gate
        self._reader()  # refuses settings out of range
        self.train(False)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The cache is made by the first forward pass."""
        return False

    @property
    def gate(self) -> CausalGate:
        """The gate, where the experts are."""
        device = self.pool.device
        if any(tensor.device != device for tensor in self._gate.tensors.values()):
            self._gate = self._gate.replaced({name: tensor.to(device) for name, tensor in self._gate.tensors.items()})
        return self._gate

    def stepper(self) -> Stepping:
        """How the model is stepped token by token: by its backbones' caches, if all of them keep one."""
        cached = all(backbone.keeps_keys for backbone in self.pool.backbones)
        models = tuple(backbone.model for backbone in self.pool.backbones)
        return Stepping(models, keeps_cache=cached, in_pieces=cached)

    @property
    def device(self) -> torch.device:
        """Device of the experts."""
        return self.pool.device

    @property
    def sparse(self) -> bool:
        """Whether fewer than all experts run per token."""
        return self._reader().sparse

    def _reader(self) -> ModularReader:
        places, config = [backbone.experts for backbone in self.pool.backbones], self.config
        return ModularReader(self.gate, places, self._run, self.vocab_size, config.top_m, config.refresh_every)

    # -- running it ---------------------------------------------------------------------------------------------

    @can_return_tuple  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Log-probabilities of the next token.

        Args:
            input_ids: BK, the tokens that are new.
            attention_mask: Mask over the cached tokens and the new ones, 0 for padding; None: all are real.
            position_ids: Not read: positions are counted over the real tokens, as `generate` counts them.
            past_key_values: Cache that an earlier pass gave.
            inputs_embeds: Refused: every expert has embeddings of its own.
            labels: BK, token ids, -100 where none is scored; shifted inside, as by transformers.
            use_cache: Whether to give a cache; None: only where one came.
            logits_to_keep: Positions answered for, from the end; 0 for all.
            kwargs: Further arguments of `generate` and transformers' models; `return_dict=False` gives a tuple.
        Returns:
            `.logits`: log pi(. | x up to and with each position), BKV, nats, float32, normalised over V; `.loss`: mean
            nats per label, without gradient, where labels came.
        Raises:
            ConfigError: token ids or a mask that do not fit, a cache of another model, or hidden states or attentions
                are asked for.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ConfigError("the experts of a gated model have embeddings of their own; pass input_ids alone")
        if asked := [name for name in _PER_EXPERT if kwargs.get(name)]:
            raise ConfigError(f"{asked[0]}: each expert has its own; run one alone (model.pool.members[0].model)")
        cache, before = past_key_values, 0 if past_key_values is None else past_key_values.get_seq_length()
        self.pool.check_ids(input_ids, before + input_ids.shape[-1])
        batch, count = input_ids.shape
        if cache is None:
            cache = ModularCache([len(each) for each in self.pool.backbones], batch, self.gate.begin, self.device)
        if not isinstance(cache, ModularCache) or cache.batch_size != batch:
            raise ConfigError(
                f"past_key_values is a {type(cache).__name__} of {cache.batch_size} sequences; pass on what this "
                f"model's own forward gave for these {batch}"
            )
        mask_BK = _new_mask(attention_mask, before, input_ids)
        kept = count if logits_to_keep == 0 else min(count, int(logits_to_keep))
        logits_BKV, loss = self._reader().read(cache, input_ids, mask_BK, kept), None
        if labels is not None:
            loss = ForCausalLMLoss(logits_BKV, labels, self.vocab_size, kwargs.get("num_items_in_batch"))
        given = cache if use_cache or past_key_values is not None else None
        return CausalLMOutputWithPast(loss=loss, logits=logits_BKV, past_key_values=given)

    def _run(self, cache: ModularCache, number: int, index_X: Tensor, places_X: Tensor, first: int, end: int) -> Tensor:
        """Slots `first` .. `end` through some rows of a backbone; log-probabilities after each, XKV, float32."""
        device, backbone, store = cache.ids_BS.device, self.pool.backbones[number], cache.stores[number]
        rows_X, places = (index_X % cache.batch_size).to(device), Rows.of(places_X.to(device))
        start = first if backbone.keeps_keys else 0  # a model whose state is no KV cache reads the text again
        arguments: dict[str, Any] = {}
        if not cache.all_real:
            real_XS = cache.real_BS[rows_X, :end]
            arguments = {"attention_mask": real_XS.long(), "position_ids": positions(real_XS)[:, start:]}
        elif backbone.keeps_keys:
            arguments["position_ids"] = torch.arange(first, end, device=device).expand(len(rows_X), -1)
        if backbone.keeps_keys:
            held = slice(None) if len(index_X) == store.rows else rows_of(index_X)
            arguments["cache"] = SlotWindow(store, held if isinstance(held, slice) else held.to(device), first)
        logits_XKV = backbone.run(places, cache.ids_BS[rows_X, start:end], **arguments)[:, first - start :]
        return torch.log_softmax(logits_XKV.float(), dim=-1)

    # -- on disk ------------------------------------------------------------------------------------------------

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters of the models, their adapters and the gate.

        Args:
            only_trainable: Whether to count only parameters that require gradients; there are none.
            exclude_embeddings: Whether to leave the models' embeddings out.
        """
        count = super().num_parameters(only_trainable, exclude_embeddings)
        if only_trainable:
            return count
        adapters = sum(member.lora.num_parameters for member in self.pool.members if member.lora is not None)
        return count + adapters + sum(self._gate.tensors[name].numel() for name in self._gate.learned)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"a gated model does not upload itself: {UPLOAD}, with copy_experts=True")

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, is_main_process: bool = True, *, copy_experts: bool = False, **kwargs: Any
    ) -> None:
        """Write the gate, the settings, and the experts or where they are.

        Args:
            save_directory: New or empty folder.
            is_main_process: Whether this process writes.
            copy_experts: Whether to write the experts' weights too (a base once, its adapters as an expert library);
                without it they are loaded again from where they came.
            kwargs: Further arguments of transformers' `save_pretrained`, for the copied weights (`max_shard_size`).
        Raises:
            ConfigError: the folder is not empty, an expert made in memory would not be copied, or an argument does not
                apply to a gated model.
        """
        options = save_options(kwargs)
        unsaved = [member.name for member in self.pool.members if member.source is None]
        if unsaved and not copy_experts:
            raise ConfigError(
                f"experts {', '.join(unsaved)} were made in memory and are in no folder; save with copy_experts=True"
            )
        if is_main_process:
            with whole_folder(Path(save_directory), "gated model") as making:
                self._write(making, copy_experts, options)

    def _write(self, folder: Path, copy: bool, options: Mapping[str, Any]) -> None:
        members, config = self.pool.members, self.config
        sources = [_placed(member.source, Path()) for member in members if member.source is not None]
        if copy:
            sources = _copy_experts(self.pool, folder, options)
        # A pool is loaded in one float type: the one that holds all of the experts'.
        widest = functools.reduce(torch.promote_types, (member.model.dtype for member in members))
        dtype = str(widest).removeprefix("torch.")
        saved = _Saved(
            format=FORMAT,
            dtype=dtype,
            top_m=config.top_m,
            refresh_every=config.refresh_every,
            copied=copy,
            experts=sources,
        )
        (folder / MANIFEST).write_text(json.dumps(saved.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
        save_gate(self._gate, folder / GATE)
        self.config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *, device: torch.device | str = "cpu", **kwargs: Any
    ) -> Self:
        """Load what `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: Folder of the model.
            device: Device the model is put on.
            kwargs: Arguments that `AutoModelForCausalLM` passes; none is read, the folder has its own settings.
        Raises:
            ConfigError: the folder holds no gated model, or an expert cannot be loaded.
            DataError: a file of the folder is missing or was altered.
            CheckpointError: the gate's file is torn.
            ExpertError: an adapter does not fit its base.
        """
        folder = Path(pretrained_model_name_or_path)
        unknown = {key for key, value in kwargs.items() if value} - {"config", "adapter_kwargs"}
        if unknown:
            raise ConfigError(f"from_pretrained of a gated model takes device alone; got {', '.join(sorted(unknown))}")
        try:
            described = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder} holds no gated model ({MANIFEST}: {reason(error)}); save one first") from error
        if not isinstance(described, dict) or described.get("format") != FORMAT:
            raise ConfigError(f"{folder / MANIFEST} is not of the format {FORMAT!r}; save the gated model again")
        saved = validate(_Saved, described, str(folder / MANIFEST))
        sources = [_placed(source, folder) if saved.copied else source for source in saved.experts]
        check_sealed(folder, "save the gated model again (weftlm gate distil)")
        pool = ExpertPool.load(sources, dtype=saved.dtype, device=device)
        model = cls(pool, load_gate(folder / GATE), top_m=saved.top_m, refresh_every=saved.refresh_every)
        model.generation_config = GenerationConfig.from_pretrained(folder)
        return model


def _new_mask(attention_mask: Tensor | None, before: int, ids_BK: Tensor) -> Tensor:
    """True for the real ones of the new tokens."""
    batch, count = ids_BK.shape
    if attention_mask is None:
        return torch.ones_like(ids_BK, dtype=torch.bool)
    if attention_mask.shape != (batch, before + count):
        raise ConfigError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it must cover {before} cached and {count} new "
            f"tokens of {batch} sequences"
        )
    return attention_mask[:, before:].to(device=ids_BK.device, dtype=torch.bool)


def _special_tokens(pool: ExpertPool) -> dict[str, Any]:
    """Ids of special tokens as the first expert has them, and the end of a text as any of them has it."""
    first = pool.members[0].model
    found = {name: _token_id(first, name) for name in ("bos_token_id", "pad_token_id")}
    ends: list[int] = []
    for member in pool.members:
        named = _token_id(member.model, "eos_token_id")
        ends += named if isinstance(named, list) else [] if named is None else [named]
    distinct = list(dict.fromkeys(ends))
    return {**found, "eos_token_id": distinct if len(distinct) > 1 else next(iter(distinct), None)}


def _token_id(model: PreTrainedModel, name: str) -> Any:
    value = getattr(model.generation_config, name, None)
    return getattr(model.config, name, None) if value is None else value


def _copy_experts(pool: ExpertPool, folder: Path, options: Mapping[str, Any]) -> list[ExpertSource]:
    """Write every backbone once and its adapters as a library; sources relative to the folder."""
    sources: dict[int, ExpertSource] = {}
    for number, backbone in enumerate(pool.backbones):
        where, library = f"{BASES}-{number}", f"{ADAPTERS}-{number}"
        backbone.model.save_pretrained(folder / where, **options)
        base, adapters = BaseReference(where, None, base_fingerprint(backbone.model)), []
        for place in backbone.experts:
            member, name = pool.members[place], f"expert-{place}"
            sources[place] = ExpertSource(name=member.name, model=where)
            if member.lora is not None:
                adapters.append(Expert(replace(member.lora, name=name, base=base)))
                sources[place] = ExpertSource(name=member.name, model=where, library=library, expert=name)
        if adapters:
            ExpertLibrary.open(folder / library, base).add(*adapters)
    return [sources[place] for place in range(len(pool))]


def _placed(source: ExpertSource, folder: Path) -> ExpertSource:
    """A source with the absolute paths of its folders, which were relative to `folder`; hub names stay."""
    if source.library is not None and source.model is None:
        base = ExpertLibrary.open(folder / source.library).base
        source = source.model_copy(update={"model": base.name, "revision": base.revision})
    places = {key: folder / value for key in ("model", "library") if (value := getattr(source, key)) is not None}
    return source.model_copy(update={key: str(path.resolve()) for key, path in places.items() if path.is_dir()})


AutoConfig.register(ModularConfig.model_type, ModularConfig)
AutoModelForCausalLM.register(ModularConfig, ModularLM)

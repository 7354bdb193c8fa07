"""Frozen expert language models under one roof: whole models, and adapters that share one base's weights in memory.

    log q_e(x_t | x_<t)         for every expert e of the pool, in as few passes as memory allows

Experts over one base run in one forward pass: the batch is repeated once per expert, and every repetition goes through
its own adapter. The base's weights are held, and read from memory, once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from weftlm.corpora.tokens import find_tokenizer
from weftlm.errors import ConfigError, ExpertError, did_you_mean
from weftlm.experts.adapted import module_input
from weftlm.experts.expert import CONFIG, LoRAExpert
from weftlm.experts.library import ExpertLibrary
from weftlm.experts.lora import adapter_fingerprint, check_fits, read_lora
from weftlm.experts.low_rank import LowRank, Rows, placement
from weftlm.files import checksum
from weftlm.gating.config import ExpertSource
from weftlm.models.factory import uneven_heads
from weftlm.models.fingerprint import base_fingerprint
from weftlm.models.open import check_vocabulary, load_base, outline, read_config

LOGITS = 1 << 26
"""Logits (sequences x tokens x vocabulary) made in one pass at most where they need not be kept."""
BUSY = {"cpu": 512}
"""Tokens that keep a device busy: experts share a pass while all their tokens together are no more. Beyond that a pass
of several is no faster than several passes, and needs more memory."""
BUSY_ELSEWHERE = 1 << 14


def experts_per_pass(tokens: int, vocab_size: int, device_type: str) -> int:
    """How many adapters over one model share a forward pass of so many tokens each."""
    most = min(LOGITS // vocab_size, BUSY.get(device_type, BUSY_ELSEWHERE))
    return max(1, most // max(1, tokens))


_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


@dataclass(frozen=True, eq=False)
class Member:
    """One expert of a pool.

    Attributes:
        name: Name, unique in the pool.
        model: Decoder-only language model; members with the same object share its weights.
        lora: Adapter through which the model runs; None: the model as it is.
        tokenizer: Fingerprint of its vocabulary (`Tokenizer.vocabulary_fingerprint`), None where it is not known.
        source: Place it was loaded from, for saving by reference; None for one made in memory.
    """

    name: str
    model: PreTrainedModel
    lora: LoRAExpert | None = None
    tokenizer: str | None = None
    source: ExpertSource | None = None


class Backbone(nn.Module):
    """One model in memory and the experts that run on it.

    Attributes:
        model: Model; its modules stay as they are, adapters are added by hooks.
        experts: Places in the pool, in the order of this backbone's own places.
        hooks: Handles of the hooks that add the adapters.
        keeps_keys: Whether all it carries from token to token is keys and values.
        vocab_size: Number of ids it gives logits for; embeddings beyond them are padding. None: all it has.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        experts: Sequence[int],
        loras: Sequence[LoRAExpert | None],
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self.experts = tuple(experts)
        kinds = set(getattr(model.config, "layer_types", None) or ()) - _ATTENTION
        self.keeps_keys = not kinds and "past_key_values" in inspect.signature(model.forward).parameters
        self._rows: Rows | None = None
        present = [lora for lora in loras if lora is not None]
        for lora in present:
            check_fits(lora, model)
        names = {name for lora in present for name in lora.modules}
        self.branches = nn.ModuleList()
        self.hooks = []
        for name, module in model.named_modules():
            if name in names:
                factors = [None if lora is None else lora.modules.get(name) for lora in loras]
                self.branches.append(branch := LowRank(factors, *placement(module)))
                self.hooks.append(module.register_forward_hook(functools.partial(self._add, branch), with_kwargs=True))

    def __len__(self) -> int:
        return len(self.experts)

    def run(self, rows: Rows, ids_XT: Tensor, *, cache: Cache | None = None, **arguments: Any) -> Tensor:
        """Logits of a batch whose sequences run through experts of their own.

        Args:
            rows: Places of this backbone.
            ids_XT: Token ids.
            cache: Keys and values of what came before; None for none.
            arguments: Further arguments of the model (`attention_mask`, `position_ids`).
        Returns:
            logits_XTV, in the model's dtype or autocast's.
        """
        if cache is not None:
            arguments["past_key_values"] = cache
        self._rows = rows if len(self.branches) else None
        try:
            logits: Tensor = self.model(input_ids=ids_XT, use_cache=cache is not None, **arguments).logits
        finally:
            self._rows = None
        return logits[..., : self.vocab_size]

    def _add(
        self, branch: LowRank, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> Tensor | None:
        """Forward hook that adds each sequence's own adapter; None keeps the output of a call outside `run`."""
        if self._rows is None:
            return None
        alone = len(module._forward_hooks) == 1  # another hook may hold what the module has just made
        return branch.add(y, module_input(args, kwargs), self._rows, in_place=alone)


class ExpertPool(nn.Module):
    """Frozen expert language models with one vocabulary.

    Embeddings of one tokenizer may be padded to different sizes: all experts are then read over the smallest, over
    which their probabilities sum to 1.

    Weights are never trained here and dropout is off whatever `train` says. Models given in memory keep their modules;
    they are frozen, put in evaluation mode, and run their adapters by hooks until `release`.

    Args:
        members: Experts, in order.
    Raises:
        ConfigError: experts differ in vocabulary or tokenizer, are no decoder-only models, or have attention heads that
            do not share their keys and values evenly.
        ExpertError: no expert, names that are not unique, or an adapter that does not fit its model.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__()
        if not members:
            raise ExpertError("a pool needs one expert at least; none came")
        self.members = tuple(members)
        self.names = tuple(member.name for member in members)
        if len(set(self.names)) < len(members):
            raise ExpertError(f"experts of a pool need different names; got {', '.join(self.names)}")
        self.vocab_size = _check_vocabulary(members)
        for member in members:
            if why := uneven_heads(member.model.config.get_text_config()):
                raise ConfigError(f"expert {member.name!r} has {why}; build it again with other numbers")
        groups: dict[PreTrainedModel, list[int]] = {}
        for place, member in enumerate(members):
            groups.setdefault(member.model, []).append(place)
        made = (
            Backbone(model, places, [members[place].lora for place in places], self.vocab_size)
            for model, places in groups.items()
        )
        self.backbones = cast("Sequence[Backbone]", nn.ModuleList(made))
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def of(cls, models: Mapping[str, PreTrainedModel]) -> Self:
        """A pool of whole models in memory, by name."""
        return cls([Member(name, model) for name, model in models.items()])

    @classmethod
    def load(
        cls,
        sources: Iterable[ExpertSource],
        *,
        base: PreTrainedModel | None = None,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
    ) -> Self:
        """Load experts; those over one base share it.

        Args:
            sources: Place of each expert, in order.
            base: Base of all of them, where it is in memory already.
            dtype: Dtype the parameters of models that are loaded are held in.
            device: Device the pool is put on. On `meta` it is made of configurations and adapters, without weights and
                their checks, as a plan wants it.
        Raises:
            ConfigError, ExpertError: as the class, or a model or adapter cannot be loaded.
        """
        shapes = torch.device(device).type == "meta"

        @functools.cache
        def model_at(name: str, revision: str | None) -> PreTrainedModel:
            if shapes:
                shape: PreTrainedModel = outline(read_config(name, revision=revision, local_files_only=True))
                return shape
            return load_base(name, revision=revision, dtype=dtype) if base is None else base

        fingerprint = functools.cache(base_fingerprint)
        members = []
        for source in sources:
            lora, key, wanted = adapter_of(source)
            model = model_at(*key)
            if wanted is not None and not shapes and fingerprint(model) != wanted:
                raise ExpertError(
                    f"expert {source.name!r} was made for a base of fingerprint {wanted}; {key[0]} has "
                    f"{fingerprint(model)}: load the base it was trained on"
                )
            places = ((source.model, source.revision), key)
            found = (find_tokenizer(name, revision) for name, revision in places if name is not None)
            tokenizer = next((each for each in found if each is not None), None)
            if tokenizer is not None:
                check_vocabulary(model, tokenizer.vocab_size, f"{key[0]} (expert {source.name!r})")
            vocabulary = None if tokenizer is None else tokenizer.vocabulary_fingerprint
            members.append(Member(source.name, model, lora, vocabulary, source))
        return cls(members).to(device)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def device(self) -> torch.device:
        """Device of the first model."""
        return next(self.parameters()).device

    @property
    def longest(self) -> int | None:
        """Positions every model takes, None where none says."""
        found = [getattr(member.model.config, "max_position_embeddings", None) for member in self.members]
        return min((int(length) for length in found if length is not None), default=None)

    @property
    def tokenizer(self) -> str | None:
        """Fingerprint of the experts' vocabulary (`Tokenizer.vocabulary_fingerprint`), None where none is known."""
        return next((member.tokenizer for member in self.members if member.tokenizer is not None), None)

    def train(self, mode: bool = True) -> Self:
        """Experts are frozen: they stay in evaluation mode."""
        del mode
        return super().train(False)

    def fingerprints(self) -> dict[str, str]:
        """By name, a fingerprint of what decides the expert's scores: base parameters, adapter, tokenizer."""
        base = functools.cache(base_fingerprint)

        def fingerprint(one: Member) -> str:
            adapter = None if one.lora is None else adapter_fingerprint(one.lora)
            return checksum([base(one.model), one.tokenizer, adapter])

        return {member.name: fingerprint(member) for member in self.members}

    def place(self, name: str) -> int:
        """Place of an expert in the pool.

        Raises:
            ExpertError: there is no such expert.
        """
        if name not in self.names:
            raise ExpertError(f"no expert {name!r} in the pool{did_you_mean(name, self.names)}")
        return self.names.index(name)

    def where(self, expert: int) -> tuple[Backbone, int]:
        """The backbone of an expert, and its place there."""
        return next((each, each.experts.index(expert)) for each in self.backbones if expert in each.experts)

    def release(self) -> None:
        """Take the hooks off the models; the pool cannot run its adapters afterwards."""
        for hook in chain.from_iterable(backbone.hooks for backbone in self.backbones):
            hook.remove()

    @torch.no_grad()
    def log_probs(self, tokens_BT: Tensor) -> Tensor:
        """log q_e(. | tokens[:, :t + 1]) of every expert for every position t.

        Args:
            tokens_BT: Token ids, int64.
        Returns:
            logp_BTEV: nats, float32; E times the size of one expert's.
        """
        self.check_ids(tokens_BT, tokens_BT.shape[-1])
        shape = (*tokens_BT.shape, len(self), self.vocab_size)
        logp_BTEV = torch.empty(shape, dtype=torch.float32, device=tokens_BT.device)
        for expert, logits_BTV in self._logits(tokens_BT):
            logp_BTEV[:, :, expert] = torch.log_softmax(logits_BTV.float(), dim=-1)
        return logp_BTEV

    @torch.no_grad()
    def token_log_probs(self, tokens_BT1: Tensor) -> Tensor:
        """log q_e(tokens[b, t + 1] | tokens[b, :t + 1]) of every expert, without keeping what other tokens would get.

        Args:
            tokens_BT1: Token ids, int64, T inputs and the label after each.
        Returns:
            logp_BTE: nats, float32.
        """
        self.check_ids(tokens_BT1, tokens_BT1.shape[-1] - 1)
        labels_BT = tokens_BT1[:, 1:]
        logp_BTE = torch.empty((*labels_BT.shape, len(self)), dtype=torch.float32, device=tokens_BT1.device)
        for expert, logits_BTV in self._logits(tokens_BT1[:, :-1]):
            own_BT = logits_BTV.float().gather(-1, labels_BT[..., None])[..., 0]
            logp_BTE[:, :, expert] = own_BT - torch.logsumexp(logits_BTV.float(), dim=-1)
        return logp_BTE

    def _logits(self, ids_BT: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each expert and its logits, BTV; as many of a backbone's experts run at a time as gain by it."""
        together = experts_per_pass(ids_BT.numel(), self.vocab_size, ids_BT.device.type)
        for backbone in self.backbones:
            for first in range(0, len(backbone), together):
                places = tuple(range(first, min(first + together, len(backbone))))
                rows, times = Rows(one=first) if len(places) == 1 else Rows(blocks=places), len(places)
                logits_MBTV = backbone.run(rows, ids_BT.repeat(times, 1)).unflatten(0, (times, -1))
                for place, logits_BTV in zip(places, logits_MBTV, strict=True):
                    yield backbone.experts[place], logits_BTV

    def check_ids(self, tokens_BT: Tensor, read: int) -> None:
        """Refuse token ids and lengths the experts do not know.

        Args:
            tokens_BT: Token ids, labels among them.
            read: Positions the experts will read.
        Raises:
            ConfigError: ids outside the vocabulary, or more tokens than positions.
        """
        if tokens_BT.ndim != 2:
            raise ConfigError(f"tokens have shape {tuple(tokens_BT.shape)}; give a batch of sequences, B x T")
        if tokens_BT.numel() and (int(tokens_BT.min()) < 0 or int(tokens_BT.max()) >= self.vocab_size):
            raise ConfigError(
                f"token ids {int(tokens_BT.min())} .. {int(tokens_BT.max())} do not fit the experts' vocabulary of "
                f"{self.vocab_size}; encode the text with their tokenizer"
            )
        longest = self.longest
        if longest is not None and read > longest:
            raise ConfigError(f"sequences of {read} tokens; the experts take {longest} positions at most")


def positions(real_BT: Tensor) -> Tensor:
    """Position of each token among the real ones before it; 0 for padding before the first."""
    return (real_BT.long().cumsum(dim=1) - 1).clamp_min(0)


def _check_vocabulary(members: Sequence[Member]) -> int:
    sizes = {}
    for member in members:
        model: object = member.model  # a caller's type checker may not have looked
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        if head is None or member.model.config.is_encoder_decoder:
            raise ConfigError(
                f"expert {member.name!r} is a {type(model).__name__}; gates combine decoder-only transformers language "
                "models (give a PEFT model as its base and the adapter: read_lora, from_peft_model)"
            )
        sizes[member.name] = int(head.weight.shape[0])
    known = [member for member in members if member.tokenizer is not None]
    for member in known:
        if member.tokenizer != known[0].tokenizer:
            raise ConfigError(
                f"experts {known[0].name!r} and {member.name!r} have different tokenizers (fingerprints "
                f"{known[0].tokenizer} and {member.tokenizer}): their token ids mean different text; use experts "
                "trained with one tokenizer"
            )
    smallest, largest = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if sizes[smallest] != sizes[largest] and len(known) < len(members):
        raise ConfigError(
            f"expert {smallest!r} has a vocabulary of {sizes[smallest]} and {largest!r} one of {sizes[largest]}; "
            "next-token probabilities can be mixed over one vocabulary only. Embeddings of one tokenizer may be padded "
            "differently where every expert comes with it: save the tokenizer beside the models"
        )
    return sizes[smallest]


def adapter_of(source: ExpertSource) -> tuple[LoRAExpert | None, tuple[str, str | None], str | None]:
    """A source's adapter, its base's name and revision, and the fingerprint that base must have."""
    if source.library is not None:
        library = ExpertLibrary.open(Path(source.library))
        own = library.base.name, library.base.revision
        key = own if source.model is None else (source.model, source.revision)
        lora = None if source.expert is None else library.load(source.expert).lora
        return lora, key, library.base.fingerprint
    assert source.model is not None
    if (Path(source.model) / CONFIG).exists():
        lora = read_lora(Path(source.model), source.name)
        if not lora.base.name:
            raise ExpertError(f"expert {source.name!r}: {source.model} does not name its base; add it to a library")
        return lora, (lora.base.name, lora.base.revision), lora.base.fingerprint
    return None, (source.model, source.revision), None

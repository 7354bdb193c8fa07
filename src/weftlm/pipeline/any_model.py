"""Any model weftlm knows, opened by its folder or hub name: base, adapted, routed, gated or distilled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers.utils import logging as transformers_logging

from weftlm.corpora.tokens import Tokenizer, find_tokenizer
from weftlm.errors import ConfigError, DataError
from weftlm.experts.expert import CONFIG as ADAPTER
from weftlm.experts.lora import load_adapted
from weftlm.gating.config import MANIFEST as GATED
from weftlm.gating.modular_lm import ModularLM
from weftlm.models.device import AUTO, choose_device
from weftlm.models.open import DTYPES, check_vocabulary, load_base, require_decoder_only
from weftlm.routing.config import MANIFEST as ROUTED
from weftlm.routing.config import parse_router
from weftlm.routing.routed_model import RoutedModel

TOKENIZER = "tokenizer"
"""Folder of the tokenizer in a routed model's folder."""
Kind = Literal["plain", "routed", "gated"]
"""One set of weights (a base, an adapter, a dense student); experts by token and module; models by token."""


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A model in memory with its tokenizer.

    Attributes:
        path: where it came from.
        kind: `plain`, `routed` or `gated`.
        model: answers Hugging Face's `forward` and `generate`; in evaluation mode.
        tokenizer: text to ids and back.
        experts: their names, in the model's order; empty for a plain one.
    """

    path: str
    kind: Kind
    model: Any
    tokenizer: Tokenizer
    experts: tuple[str, ...]

    @property
    def max_length(self) -> int | None:
        """Tokens the model can read; None where it does not say."""
        if isinstance(self.model, ModularLM):
            return self.model.pool.longest
        size = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        return size if isinstance(size, int) and size > 0 else None


def open_model(
    path: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "float32",
    device: str = AUTO,
    encoder_decoder: bool = False,
    router: str | None = None,
    experts: Sequence[str] | None = None,
) -> OpenModel:
    """Open a model for use, whatever made it.

    Args:
        path: A run folder of `weftlm train` (its model), a folder of `weftlm route build`, a gated model's folder
            (`weftlm gate distil`), any folder of a Hugging Face model or PEFT adapter, or a hub name.
        base: Folder or hub name of the base of a routed model or an adapter, where it has moved.
        revision: Revision of a hub name.
        tokenizer: Folder or hub name of the tokenizer; None for the one beside the model or its experts.
        dtype: Data type of a plain model's parameters; the folders of routed and gated ones name their own.
        device: Device to run on (`choose_device`).
        encoder_decoder: Whether encoder-decoder models are accepted.
        router: Router in one word under which an expert library is opened; None: a library is no model.
        experts: Names of the library's experts to route among; None for all.
    Raises:
        ConfigError: there is no such model, or it is an encoder-decoder model and that will not do.
        DataError: it comes without a tokenizer and none was named.
        ExpertError: an expert does not fit its base.
    """
    transformers_logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    place = choose_device(device)
    folder = Path(path)
    if not (folder / "config.json").exists() and (folder / "model").is_dir() and (folder / "recipe.yaml").exists():
        folder = folder / "model"
    kind: Kind = "plain"
    model: Any
    names: tuple[str, ...] = ()
    places: list[tuple[str | None, str | None]]
    if (folder / ROUTED).exists() or router is not None:
        if router is None:
            model = RoutedModel.from_pretrained(folder, base=base, device=place)
        else:
            model = RoutedModel.from_library(
                base, folder, parse_router(router), experts=experts, revision=revision, dtype=dtype, device=place
            )
        kind, names = "routed", tuple(expert.name for expert in model.experts)
        inner, reference = [model.model], model.base_reference
        places = [(str(folder / TOKENIZER) if router is None else None, None), (reference.name, reference.revision)]
    elif (folder / ADAPTER).exists():
        model = load_adapted(folder, base=base, revision=revision, dtype=dtype).to(place)
        inner = [model.get_base_model()]
        adapted = model.peft_config["default"]
        places = [(str(folder), None), (base, revision), (adapted.base_model_name_or_path, adapted.revision)]
    elif base is not None:
        raise ConfigError(f"base is for routed models and adapters; {path} is none")
    elif (folder / GATED).exists():
        model = ModularLM.from_pretrained(folder, device=place)
        kind, names, inner = "gated", tuple(model.pool.names), [member.model for member in model.pool.members]
        sources = [member.source for member in model.pool.members if member.source is not None]
        bases = [member.lora.base for member in model.pool.members if member.lora is not None]
        places = [(str(folder), None), *((each.model, each.revision) for each in sources)]
        places += [(each.name, each.revision) for each in bases]
    else:
        name = str(folder) if folder.is_dir() else str(path)
        model = nn.Module.to(load_base(name, revision=revision, dtype=dtype), place)
        inner, places = [model], [(name, revision)]
    model.eval()
    for each in () if encoder_decoder else inner:
        require_decoder_only(each, str(path))
    tried = {(tokenizer, None): None} if tokenizer is not None else dict.fromkeys(place for place in places if place[0])
    found = next((one for one in (find_tokenizer(str(name), at) for name, at in tried) if one is not None), None)
    if found is None:
        looked = ", ".join(str(name) for name, _ in tried)
        raise DataError(
            f"{path} comes without a tokenizer (looked in {looked}); save one beside it, or name one (tokenizer)"
        )
    for each in inner:
        check_vocabulary(each, found.vocab_size, str(path))
    return OpenModel(str(path), kind, model, found, names)

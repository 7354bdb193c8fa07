"""Any model weftlm knows, opened from where it lies: base, adapted, routed, gated or distilled."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers.utils import logging as transformers_logging

from weftlm.corpora.tokens import Tokenizer, find_tokenizer
from weftlm.errors import ConfigError, DataError
from weftlm.experts.files import CONFIG as ADAPTER
from weftlm.experts.lora import load_adapted
from weftlm.gating.config import MANIFEST as GATED
from weftlm.gating.modular_lm import ModularLM
from weftlm.models.device import AUTO, choose_device
from weftlm.models.open import DTYPES, check_vocabulary, load_base, require_decoder_only
from weftlm.pipeline.routes import TOKENIZER
from weftlm.routing.config import MANIFEST as ROUTED
from weftlm.routing.routed_model import RoutedModel

log = logging.getLogger(__name__)

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
            sizes = [_positions(member.model) for member in self.model.pool.members]
            return min((size for size in sizes if size is not None), default=None)
        return _positions(self.model)


def open_model(
    path: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "float32",
    device: str = AUTO,
    encoder_decoder: bool = False,
) -> OpenModel:
    """Open a model for use, whatever made it.

    Args:
        path: a run folder of `weftlm train` (its model), a folder of `weftlm route build`, a gated model's folder
            (`weftlm gate distil`), any folder of a Hugging Face model or PEFT adapter, or a hub name.
        base: another place to load the base of a routed model or an adapter from.
        revision: of a hub name.
        tokenizer: folder or hub name; None for the one that lies beside the model or its experts.
        dtype: a plain model's parameters are held in; routed and gated ones say themselves.
        device: where to run (`choose_device`).
        encoder_decoder: whether an encoder-decoder model will do.
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
    kind: Kind
    model: Any
    places: list[str]
    if (folder / ROUTED).exists():
        routed = RoutedModel.from_pretrained(folder, base=base, device=place)
        kind, model, experts = "routed", routed, tuple(expert.name for expert in routed.experts)
        if not encoder_decoder:
            require_decoder_only(routed.model, str(path))
        places = [str(folder / TOKENIZER), *([base] if base is not None else []), routed.base_reference.name]
    elif (folder / ADAPTER).exists():
        plain = load_adapted(folder, base=base, revision=revision, dtype=dtype)
        kind, model, experts = "plain", plain.to(place), ()
        if not encoder_decoder:
            under: Any = plain.get_base_model()
            require_decoder_only(under, str(path))
        places = [str(folder), str(plain.peft_config["default"].base_model_name_or_path or base)]
    elif base is not None:
        raise ConfigError(f"base is for routed models and adapters; {path} is none")
    elif (folder / GATED).exists():
        gated = ModularLM.from_pretrained(folder, device=place)
        kind, model, experts = "gated", gated, tuple(gated.pool.names)
        places = [str(folder), *_expert_places(gated)]
    else:
        kind, model, experts = "plain", _plain(folder, str(path), revision, dtype, encoder_decoder).to(place), ()
        places = [str(folder) if folder.is_dir() else str(path)]
    model.eval()
    found = _tokenizer([tokenizer] if tokenizer is not None else places, revision, str(path))
    for each in [member.model for member in model.pool.members] if kind == "gated" else [model]:
        check_vocabulary(each, found.vocab_size, str(path))
    if kind == "routed" and model.router.needs_text:
        model.router.set_decode(found.decode)
    return OpenModel(str(path), kind, model, found, experts)


def _plain(folder: Path, name: str, revision: str | None, dtype: str, encoder_decoder: bool) -> Any:
    model = load_base(str(folder) if folder.is_dir() else name, revision=revision, dtype=dtype)
    return model if encoder_decoder else require_decoder_only(model, name)


def _expert_places(model: ModularLM) -> list[str]:
    """Folders and hub names of a gated model's experts and their bases."""
    found: list[str] = []
    for member in model.pool.members:
        if member.source is not None and member.source.model is not None:
            found.append(member.source.model)
        if member.lora is not None:
            found.append(member.lora.base.name)
    return list(dict.fromkeys(found))


def _tokenizer(places: list[str], revision: str | None, path: str) -> Tokenizer:
    for place in places:
        if place and (found := find_tokenizer(place, revision)) is not None:
            return found
    raise DataError(
        f"{path} comes without a tokenizer (looked in {', '.join(place for place in places if place)}); save one "
        "beside it, or name one (tokenizer)"
    )


def _positions(model: nn.Module) -> int | None:
    size = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return size if isinstance(size, int) and size > 0 else None

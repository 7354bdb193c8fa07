"""The base model under experts: loaded, told by its fingerprint, and checked against the tokenizer of the data."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from weftlm.corpora.examples import examples_of
from weftlm.corpora.tokens import Tokenizer, find_tokenizer
from weftlm.errors import ConfigError, DataError
from weftlm.experts.expert import BaseReference
from weftlm.models.factory import check_positions
from weftlm.models.fingerprint import base_fingerprint
from weftlm.models.open import check_vocabulary, load_base
from weftlm.models.prompted import is_encoder_decoder
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.train import require_same_data

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """A base model in memory, on the CPU, and its reference."""

    model: PreTrainedModel
    reference: BaseReference


def open_base(recipe: Recipe, data: PreparedData) -> Base:
    """Load the base of a recipe's experts and check that the prepared data is its own.

    Raises:
        ConfigError: there is no such model, it is no language model, it is too small for the tokenizer or the
            sequences, or it is an encoder-decoder and the data has no prompts.
        DataError: the data was tokenised with another tokenizer, or the run's own model was trained on other data.
    """
    transformers_logging.disable_progress_bar()
    name, revision = recipe.base, recipe.expert_settings.revision
    if recipe.expert_settings.base is None:
        if not Path(name).is_dir():
            how = "weftlm train" if recipe.expert_settings.baseline is None else "weftlm run --until baselines"
            raise ConfigError(f"{recipe.base_run} has no trained model yet; finish it with {how}, or set experts.base")
        require_same_data(recipe.base_run, data)
    check_base_kind(name)
    model = load_base(name, revision=revision, dtype=recipe.expert_settings.dtype)
    if is_encoder_decoder(model):
        _check_examples(recipe, data, name)
    _check_tokenizer(model, data.tokenizer, name, revision)
    check_lengths(recipe, model.config)
    return Base(model, BaseReference(name, revision, base_fingerprint(model)))


def check_base_kind(name: str) -> None:
    """Refuse an adapter as a base.

    Raises:
        ConfigError: it is one.
    """
    if (Path(name) / "adapter_config.json").exists():
        raise ConfigError(
            f"the base {name} is an adapter over another model; name that model as experts.base, or merge the adapter "
            f"into it first (PEFT: merge_and_unload, save_pretrained)"
        )


def check_lengths(recipe: Recipe, config: PretrainedConfig) -> None:
    """Refuse experts or gates of longer sequences than the base takes.

    Raises:
        ConfigError: they are.
    """
    experts = recipe.expert_settings
    check_positions(config, experts.training.sequence_length, "experts.training.sequence_length", "the base")
    check_positions(config, experts.gate.sequence_length or 0, "experts.gate.sequence_length", "the base")


def _check_examples(recipe: Recipe, data: PreparedData, name: str) -> None:
    """An encoder-decoder reads prompts and writes targets: it is trained and judged on examples alone."""
    sources = [(domain.name, each) for domain in data.domains for each in (domain.train, domain.heldout)]
    sources += [("the target", each) for each in (data.target_train, data.target_heldout)]
    plain = list(dict.fromkeys(each for each, source in sources if source is not None and examples_of(source) is None))
    if plain:
        raise ConfigError(
            f"the base {name} is an encoder-decoder model, which learns from prompts and targets, and documents of "
            f"{', '.join(plain[:5])} have none; give their corpora a prompt_field, the held-out ones too"
        )
    if recipe.expert_settings.examples is False:
        raise ConfigError(
            f"the base {name} is an encoder-decoder model, which learns from examples; leave out "
            f"experts.examples: false"
        )


def _check_tokenizer(model: PreTrainedModel, tokenizer: Tokenizer, name: str, revision: str | None) -> None:
    check_vocabulary(model, tokenizer.vocab_size, f"{name} (the base)")
    own = find_tokenizer(name, revision)
    if own is None:
        log.warning("the base %s brings no tokenizer to compare; make sure that the data was tokenised for it", name)
    elif own.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"the data was tokenised with another tokenizer than the one that comes with the base {name}; prepare it "
            f"with data.tokenizer: {{pretrained: {name}}}, in a folder of its own (prepared)"
        )

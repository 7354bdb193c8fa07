"""The base model under experts: loaded, known by its fingerprint, and checked against the tokenizer of the data."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from weftlm.corpora.tokens import find_tokenizer
from weftlm.errors import ConfigError, DataError
from weftlm.experts.expert import BaseReference
from weftlm.models.factory import check_positions
from weftlm.models.fingerprint import base_fingerprint
from weftlm.models.open import check_vocabulary, load_base
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
        ConfigError: there is no such model, it is no language model, or it is too small for the tokenizer or the
            sequences.
        DataError: the data was tokenised with another tokenizer, or the run's own model was trained on other data.
    """
    transformers_logging.disable_progress_bar()
    name, revision = recipe.base, recipe.expert_settings.revision
    if recipe.expert_settings.base is None:
        if not Path(name).is_dir():
            how = "weftlm train" if recipe.expert_settings.baseline is None else "weftlm run --until baselines"
            raise ConfigError(f"{recipe.base_run} has no trained model yet; finish it with {how}, or set experts.base")
        require_same_data(recipe.base_run, data)
    model = load_base(name, revision=revision, dtype=recipe.expert_settings.dtype)
    check_vocabulary(model, data.tokenizer.vocab_size, f"{name} (the base)")
    own = find_tokenizer(name, revision)
    if own is None:
        log.warning("the base %s brings no tokenizer to compare; make sure that the data was tokenised for it", name)
    elif own.fingerprint != data.tokenizer.fingerprint:
        raise DataError(
            f"the data was tokenised with another tokenizer than the one that comes with the base {name}; prepare it "
            f"with data.tokenizer: {{pretrained: {name}}}, in a folder of its own (prepared)"
        )
    check_lengths(recipe, model.config)
    return Base(model, BaseReference(name, revision, base_fingerprint(model)))


def check_lengths(recipe: Recipe, config: PretrainedConfig) -> None:
    """Refuse experts or gates of longer sequences than the base takes.

    Raises:
        ConfigError: they are.
    """
    experts = recipe.expert_settings
    check_positions(config, experts.training.sequence_length, "experts.training.sequence_length", "the base")
    check_positions(config, experts.gate.sequence_length or 0, "experts.gate.sequence_length", "the base")

"""What `--dry-run` says of a recipe: parameters, tokens, steps."""

from __future__ import annotations

from typing import Any

import torch

from weftlm.models.config import ModelConfig
from weftlm.models.factory import architecture_config, check_adapter, from_architecture
from weftlm.pipeline.recipe import Recipe, check


def plan(recipe: Recipe) -> dict[str, Any]:
    """What a run will do, before anything is read: parameters, tokens, steps."""
    check(recipe)
    check_adapter(recipe.model)
    training = recipe.training
    described: dict[str, Any] = {
        "run": str(recipe.run),
        "policy": recipe.mixture.policy,
        "steps": training.total_steps,
        "sequences_per_step": training.batch_sequences,
        "tokens": training.total_tokens,
        "policy_updates": training.total_steps // recipe.mixture.update_every_steps,
    }
    vocabulary = recipe.data.tokenizer.train.vocab_size if recipe.data.tokenizer.train is not None else None
    if recipe.model.architecture is not None and vocabulary is not None:
        described["parameters"] = count_from_config(recipe.model, vocabulary, training.sequence_length)
    return described


def count_from_config(model: ModelConfig, vocab_size: int, sequence_length: int) -> int:
    """Parameters of a model from scratch, counted on the meta device: no memory is taken."""
    config = architecture_config(model, vocab_size=vocab_size, sequence_length=sequence_length, eos_id=0)
    with torch.device("meta"):
        built = from_architecture(config)
    return sum(parameter.numel() for parameter in built.parameters())

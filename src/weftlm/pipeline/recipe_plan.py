"""What `--dry-run` says a recipe will do, before anything is read."""

from __future__ import annotations

from typing import Any

from weftlm.models.config import ModelConfig
from weftlm.pipeline.names import DENSE, DIRECT, STUDENT
from weftlm.pipeline.recipe import Recipe, check


def training_plan(recipe: Recipe) -> dict[str, Any]:
    """What training will do: parameters, tokens, steps."""
    from weftlm.models.factory import check_adapter  # noqa: PLC0415 - torch

    check(recipe)
    model, mixture, training = recipe.trained
    check_adapter(model)
    described: dict[str, Any] = {
        "run": str(recipe.run),
        "policy": mixture.policy,
        "steps": training.total_steps,
        "sequences_per_step": training.batch_sequences,
        "tokens": training.total_tokens,
        "policy_updates": training.total_steps // mixture.update_every_steps,
    }
    vocabulary = recipe.data.tokenizer.train.vocab_size if recipe.data.tokenizer.train is not None else None
    if model.architecture is not None and vocabulary is not None:
        described["parameters"] = count_from_config(model, vocabulary, training.sequence_length)
    return described


def count_from_config(model: ModelConfig, vocab_size: int, sequence_length: int) -> int:
    """Parameters of a model from scratch, counted on the meta device: no memory is taken."""
    import torch  # noqa: PLC0415 - a wrong recipe is refused without it

    from weftlm.models.factory import architecture_config, from_architecture  # noqa: PLC0415 - torch

    config = architecture_config(model, vocab_size=vocab_size, sequence_length=sequence_length, eos_id=0)
    with torch.device("meta"):
        built = from_architecture(config)
    return sum(parameter.numel() for parameter in built.parameters())


def expert_plan(recipe: Recipe) -> dict[str, Any]:
    """What making the experts will do."""
    config = recipe.expert_settings
    training = config.training
    return {
        "base": recipe.base,
        "library": str(recipe.library_folder),
        "domains": "every domain of the data" if config.domains is None else ", ".join(config.domains),
        "rank": config.lora.rank,
        "steps_per_expert": training.total_steps,
        "tokens_per_expert": training.total_tokens,
        "gate_steps": config.gate.steps,
        "statistics_examples": config.statistics_examples,
    }


def gate_plan(recipe: Recipe) -> dict[str, Any]:
    """What scoring, fitting and certifying will do."""
    config = recipe.gating_settings
    if config.pool is not None:
        pool = {"experts": ", ".join(source.name for source in config.pool)}
    else:
        named = "every expert of the library" if config.experts is None else ", ".join(config.experts)
        pool = {"base": recipe.base, "library": str(recipe.library_folder), "experts": named}
    return {
        **pool,
        "domains": "every domain with held-out text" if config.domains is None else ", ".join(config.domains),
        "scores": str(recipe.scores_folder),
        "tokens_per_domain": f"{config.scores.sequences * config.scores.length} at most",
        "samples_per_expert": config.scores.samples,
        "gate": config.gate.gate,
        "fit_steps": config.fit.steps,
        "result": str(recipe.gate_folder),
    }


def student_plan(recipe: Recipe, *, direct: bool) -> dict[str, Any]:
    """What distilling will do."""
    config, kind = recipe.gating_settings.students, DIRECT if direct else STUDENT
    names = [kind, *(f"{kind}-top-{m}" for m in sorted(set(config.experts_per_token)))]
    if config.dense is not None:
        names.append(DENSE if kind == STUDENT else f"{kind}-{DENSE}")
    return {
        "gate": "trained on the minimax objective" if direct else str(recipe.gate_folder),
        "scores": str(recipe.scores_folder),
        "steps": config.direct.fit.steps if direct else config.distil.steps,
        "students": ", ".join(names),
        "result": str(recipe.students_folder),
    }

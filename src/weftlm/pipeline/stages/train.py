"""The stage `train`: the base, on its mixture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weftlm.errors import ConfigError, install_hint
from weftlm.files import SEAL
from weftlm.pipeline.names import RESULT
from weftlm.pipeline.stage import Stage, StageOptions, stages

if TYPE_CHECKING:
    from weftlm.pipeline.checks import Known
    from weftlm.pipeline.recipe import Recipe

_LEFT = (
    "checkpoints", "metrics.jsonl", "model", RESULT, "run.json", "recipe.yaml", "windows.safetensors", "reference",
    "tensorboard",
)  # fmt: skip


@stages.register("train", does="the base, on its mixture", costs="training.tokens through the model")
class Train(Stage):
    """A language model trained on a mixture of the domains."""

    needs = ("prepare",)
    costly = True
    shared = True

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.trains

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return recipe.deciding()

    def outputs(self, recipe: Recipe) -> list[Path]:
        return [recipe.run / RESULT, recipe.run / "model" / SEAL]

    def discarded(self, recipe: Recipe) -> list[Path]:
        return [recipe.run / name for name in _LEFT]

    def check(self, recipe: Recipe, known: Known) -> None:
        from weftlm.models.factory import check_positions, config_to_be  # noqa: PLC0415 - transformers
        from weftlm.models.lora_targets import check_targets  # noqa: PLC0415 - transformers

        known.attempt(check_mixture, recipe)
        for tracker in recipe.trackers if known.here else ():
            if find_spec(tracker) is None:
                raise ConfigError(f"trackers names {tracker}, which is not installed; {install_hint(tracker)}")
        model, _, training = recipe.trained
        if not (recipe.run / RESULT).exists():
            known.locate(model.pretrained, "model.pretrained", model.revision)
        config = config_to_be(model, sequence_length=training.sequence_length)
        if model.lora is not None and config is not None:
            known.attempt(check_targets, config, model.lora.target_modules, "model.lora")
        check_positions(config, training.sequence_length, "training.sequence_length", "the model")

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        from weftlm.pipeline.train import run_training  # noqa: PLC0415 - torch

        run_training(recipe)

    def shown(self, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
        from weftlm.pipeline.train import read_result  # noqa: PLC0415 - torch

        name = recipe.trained[1].policy
        return {"mixture": {name: read_result(recipe.run)}}, {"runs": {name: recipe.run}}


def check_mixture(recipe: Recipe) -> None:
    """Refuse a mixture policy that needs what is not there.

    Raises:
        ConfigError: The policy follows a target and there is none, it reweights distributions and none are given, or
            its reference has no model.
    """
    _, mixture, _ = recipe.trained
    if mixture.needs & {"target_alignment", "target_histogram"} and not recipe.data.target:
        raise ConfigError(f"mixture policy {mixture.policy!r} follows a target and the data has none; give data.target")
    if "basis" in mixture.needs and recipe.data.domains.basis is None:
        raise ConfigError(f"mixture policy {mixture.policy!r} reweights distributions; say which in data.domains.basis")
    reference = getattr(mixture, "reference", None)
    if reference is not None and not (Path(reference) / "model").is_dir():
        raise ConfigError(f"mixture.reference: {reference} has no trained model yet; finish it with weftlm train")


def training_plan(recipe: Recipe) -> dict[str, Any]:
    """Steps and tokens of a training, and the parameters of a model from scratch, for which no memory is taken."""
    from weftlm.models.factory import architecture_config, count_parameters  # noqa: PLC0415 - torch
    from weftlm.models.open import outline  # noqa: PLC0415 - torch

    model, mixture, training = recipe.trained
    described: dict[str, Any] = {
        "steps": training.total_steps,
        "tokens": training.total_tokens,
        "policy_updates": training.total_steps // mixture.update_every_steps,
    }
    trained = recipe.data.tokenizer.train
    if model.architecture is not None and trained is not None:
        config = architecture_config(
            model, vocab_size=trained.vocab_size, sequence_length=training.sequence_length, eos_id=0
        )
        described["parameters"] = count_parameters(outline(config))
    return described

"""The stage `train`: the base, on its mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weftlm.files import SEAL
from weftlm.pipeline.checks import PLACEHOLDER_VOCABULARY, Known, configuration
from weftlm.pipeline.names import RESULT
from weftlm.pipeline.recipe import Recipe, check
from weftlm.pipeline.stage import Stage, StageOptions, stages

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

    def check_recipe(self, recipe: Recipe, known: Known) -> None:
        check(recipe, packages=known.here)

    def check_files(self, recipe: Recipe, known: Known) -> None:
        """Refuse sizes that do not fit each other, and sequences longer than the model's positions."""
        from weftlm.models.factory import architecture_config, check_positions  # noqa: PLC0415 - transformers

        model, _, training = recipe.trained
        if not (recipe.run / RESULT).exists():
            known.locate(model.pretrained, "model.pretrained", model.revision)
        if model.architecture is not None:
            trained = recipe.data.tokenizer.train
            vocabulary = PLACEHOLDER_VOCABULARY if trained is None else trained.vocab_size
            length = training.sequence_length
            config: Any = architecture_config(model, vocab_size=vocabulary, sequence_length=length, eos_id=0)
        else:
            config = configuration(str(model.pretrained), model.revision)
        check_positions(config, training.sequence_length, "training.sequence_length", "the model")

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        from weftlm.pipeline.train import run_training  # noqa: PLC0415 - torch

        run_training(recipe)

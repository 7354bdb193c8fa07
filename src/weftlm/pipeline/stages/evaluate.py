"""The stage `evaluate`: every model on the same held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weftlm.config import settings
from weftlm.evaluation.config import task_files
from weftlm.pipeline.names import EVALUATION
from weftlm.pipeline.stage import Stage, StageOptions, stages, stages_of

if TYPE_CHECKING:
    from weftlm.pipeline.checks import Known
    from weftlm.pipeline.recipe import Recipe


def evaluation_settings(recipe: Recipe) -> dict[str, Any]:
    """The `evaluation` section, and what the files of its tasks hold."""
    files = task_files(recipe.evaluation.tasks)
    section = settings(recipe.evaluation, without=("every_steps",))
    return {"evaluation": section, **({"task_files": files} if files else {})}


@stages.register("evaluate", does="every model on the same held-out text", costs="held-out text once for each model")
class Evaluate(Stage):
    """Every model that a project has made, measured in one way."""

    needs = ("prepare", "train", "baselines", "experts", "route", "distil")

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """How models are measured, and which stages make them."""
        found = {**evaluation_settings(recipe), "stages": [stage.name for stage in stages_of(recipe)]}
        if not recipe.has_experts:
            return found
        experts = recipe.expert_settings
        return {
            **found, "dtype": experts.dtype, "examples": experts.examples,
            "sequence_length": experts.training.sequence_length,
        }  # fmt: skip

    def outputs(self, recipe: Recipe) -> list[Path]:
        return [recipe.run / EVALUATION]

    def check(self, recipe: Recipe, known: Known) -> None:
        if recipe.evaluation.tasks and known.here:
            from weftlm.evaluation.choices import read_tasks  # noqa: PLC0415 - torch

            read_tasks(recipe.evaluation.tasks)

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        from weftlm.pipeline.heldout import evaluate_models  # noqa: PLC0415 - torch

        evaluate_models(recipe, progress=options.progress)

    def shown(self, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
        from weftlm.pipeline.heldout import read_evaluation  # noqa: PLC0415 - torch
        from weftlm.reporting.score_table import model_table  # noqa: PLC0415 - torch

        found = read_evaluation(recipe)
        summary = {key: found[key] for key in ("sequence_length", "base", "models")}
        return summary, {"models": model_table(found["models"], "model", found["sequence_length"])}

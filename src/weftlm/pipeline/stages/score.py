"""The stage `score`: text and samples under every expert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weftlm.pipeline.stage import Stage, StageOptions, stages

if TYPE_CHECKING:
    from weftlm.pipeline.checks import Known
    from weftlm.pipeline.recipe import Recipe


@stages.register("score", does="text and samples under every expert", costs="scored tokens times experts, forward")
class Score(Stage):
    """What every expert says of held-out text and of samples of each expert."""

    needs = ("prepare", "experts")
    costly = True
    shared = True

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.has_gate

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        section = recipe.gating_deciding("scores", "experts", "pool", "domains")
        return {**section, "dtype": recipe.expert_settings.dtype}

    def outputs(self, recipe: Recipe) -> list[Path]:
        return [recipe.scores_folder / "index.json"]

    def check(self, recipe: Recipe, known: Known) -> None:
        for source in recipe.gating_settings.pool or ():
            key = f"gating.pool: {source.name}"
            known.locate(source.model, key, source.revision)
            known.locate(source.library, key)

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        from weftlm.pipeline.scoring import score_experts  # noqa: PLC0415 - torch

        score_experts(recipe, overwrite=options.replace, progress=options.progress)

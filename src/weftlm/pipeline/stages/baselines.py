"""The stage `baselines`: the same model on other mixtures, and one model on all that the experts see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weftlm.config import settings
from weftlm.files import SEAL
from weftlm.pipeline.checks import Known
from weftlm.pipeline.names import RESULT
from weftlm.pipeline.recipe import MONOLITH, Recipe
from weftlm.pipeline.stage import Stage, StageOptions, stages
from weftlm.pipeline.stages.train import check_mixture


@stages.register("baselines", does="other mixtures and the monolith", costs="as train, for each")
class Baselines(Stage):
    """The models that the mixture and the gate are compared with."""

    needs = ("prepare", "train")
    costly = True
    shared = True

    def wanted(self, recipe: Recipe) -> bool:
        return bool(recipe.compare.mixtures) or recipe.trains_monolith

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        found = {policy.policy: recipe.baseline(policy).deciding() for policy in recipe.compare.mixtures}
        if recipe.trains_monolith:
            experts = recipe.expert_settings
            found[MONOLITH] = {
                "tokens": experts.training.total_tokens,
                **settings(experts, only=("base", "baseline", "revision", "domains")),
            }
        return found

    def outputs(self, recipe: Recipe) -> list[Path]:
        folders = [recipe.baselines_folder / name for name in self.settings(recipe)]
        return [folder / each for each in (RESULT, f"model/{SEAL}") for folder in folders]

    def discarded(self, recipe: Recipe) -> list[Path]:
        return [recipe.baselines_folder]

    def check(self, recipe: Recipe, known: Known) -> None:
        for policy in recipe.compare.mixtures:
            known.attempt(check_mixture, recipe.baseline(policy))

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        from weftlm.pipeline.experts import expert_domains  # noqa: PLC0415 - torch
        from weftlm.pipeline.prepared import PreparedData  # noqa: PLC0415 - torch
        from weftlm.pipeline.train import run_training  # noqa: PLC0415 - torch

        for policy in recipe.compare.mixtures:
            run_training(recipe.baseline(policy))
        if recipe.trains_monolith:
            domains = PreparedData.load(recipe.prepared_folder).domains
            run_training(recipe.monolith(len(expert_domains(domains, recipe.expert_settings.domains))))

"""The stage `gate`: the robust gate and its certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weftlm.errors import ConfigError, did_you_mean
from weftlm.pipeline.checks import Known
from weftlm.pipeline.gate_recipe import check_domains
from weftlm.pipeline.names import CERTIFICATE, FIT, GATE
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.stage import Stage, StageOptions, stages


@stages.register("gate", does="the robust gate and its certificate", costs="minutes on a CPU; no expert is run")
class GateStage(Stage):
    """The gate that is best against the worst mixture of the domains."""

    needs = ("score",)

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.has_gate

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return recipe.gating_deciding("gate", "fit", "offsets", "mixtures", "held_out_fraction")

    def outputs(self, recipe: Recipe) -> list[Path]:
        return [recipe.gate_folder / name for name in (FIT, CERTIFICATE, GATE)]

    def discarded(self, recipe: Recipe) -> list[Path]:
        return [recipe.gate_folder]

    def check(self, recipe: Recipe, known: Known) -> None:
        from weftlm.models.factory import check_positions  # noqa: PLC0415 - transformers
        from weftlm.models.open import config_at_hand  # noqa: PLC0415 - transformers
        from weftlm.pipeline.gating import check_samples, own_experts  # noqa: PLC0415 - torch

        config = recipe.gating_settings
        check_samples(config, scored=config.scores.samples > 0)
        if config.pool is None:
            configurations, experts = [known.base], known.experts
        else:
            configurations = [config_at_hand(each.model, each.revision) for each in config.pool if each.model]
            experts = [source.name for source in config.pool]
        for found in configurations:
            check_positions(found, config.scores.length, "gating.scores.length", "an expert")
        if config.experts is not None and experts is not None:
            for name in config.experts:
                if name not in experts:
                    raise ConfigError(f"gating.experts names {name!r}, which is no expert{did_you_mean(name, experts)}")
            experts = config.experts
        if known.domains is None:
            return
        if config.domains is not None:
            check_domains(config.domains, known.domains, "gating.domains")
        scored = known.domains if config.domains is None else config.domains
        config.offsets_over(scored)
        config.mixtures.over(scored)
        if config.offsets == "expert" and experts is not None:
            own_experts(scored, experts)

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        from weftlm.pipeline.gating import certify_gate, fit_gate  # noqa: PLC0415 - torch

        fit_gate(recipe, progress=options.progress)
        certify_gate(recipe)

"""The stage `distil`: causal students that can be served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weftlm.files import SEAL
from weftlm.gating.config import MANIFEST, gates
from weftlm.pipeline.checks import Known
from weftlm.pipeline.names import STUDENT
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.stage import Stage, StageOptions, stages


@stages.register("distil", does="causal students that can be served", costs="minutes on a CPU; hours for a dense one")
class Distil(Stage):
    """Causal models of the fitted gate: all experts, the best few per token, one dense model."""

    needs = ("score", "gate")

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.has_gate

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return recipe.gating_deciding("students")

    def outputs(self, recipe: Recipe) -> list[Path]:
        names = ("student.json", f"{STUDENT}/{MANIFEST}", f"{STUDENT}/{SEAL}")
        return [recipe.students_folder / name for name in names]

    def discarded(self, recipe: Recipe) -> list[Path]:
        return [recipe.students_folder]

    def check(self, recipe: Recipe, known: Known) -> None:
        from weftlm.pipeline.students import check_teaching_samples  # noqa: PLC0415 - torch

        config = recipe.gating_settings
        if known.whole and gates[config.gate.gate].causal:  # of others the stage `gate` says that they need samples
            check_teaching_samples(config, scored=config.scores.samples > 0, direct=False)

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        from weftlm.pipeline.students import distil_gate  # noqa: PLC0415 - torch

        distil_gate(recipe, progress=options.progress)

"""The stage `report`: one page and one summary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weftlm.pipeline.names import REPORT, SUMMARY
from weftlm.pipeline.stage import Stage, StageOptions, stages, stages_of

if TYPE_CHECKING:
    from weftlm.pipeline.recipe import Recipe


@stages.register("report", does="one page and one summary", costs="seconds")
class Report(Stage):
    """The page about everything, and its figures as one JSON file."""

    needs = ("train", "baselines", "route", "gate", "distil", "evaluate")

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return {"stages": [stage.name for stage in stages_of(recipe)]}

    def outputs(self, recipe: Recipe) -> list[Path]:
        return [recipe.run / REPORT, recipe.run / SUMMARY]

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        from weftlm.pipeline.project_report import report_project  # noqa: PLC0415 - torch

        report_project(recipe)

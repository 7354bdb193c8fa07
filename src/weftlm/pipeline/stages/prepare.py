"""The stage `prepare`: corpora to domains and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weftlm.errors import ConfigError
from weftlm.pipeline.checks import Known
from weftlm.pipeline.identity import MANIFEST, data_identity, input_states
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.stage import Stage, StageOptions, stages


@stages.register("prepare", does="corpora to domains and tokens", costs="one pass over the text for each step")
class Prepare(Stage):
    """Text read, de-duplicated, divided into domains, split and tokenised."""

    costly = True
    shared = True

    def wanted(self, recipe: Recipe) -> bool:
        return True

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return data_identity(recipe.data)

    def outputs(self, recipe: Recipe) -> list[Path]:
        return [recipe.prepared_folder / MANIFEST]

    def check_recipe(self, recipe: Recipe, known: Known) -> None:
        data = recipe.data
        none = not data.heldout and not data.split.holds_out
        target = bool(data.target_heldout) or (bool(data.target) and data.target_split.holds_out)
        gated = recipe.gating is not None
        if none and (gated or not target):
            what = "score" if gated else "evaluate on"
            raise ConfigError(f"nothing is held out to {what}; raise data.split.fraction, or give data.heldout")

    def check_files(self, recipe: Recipe, known: Known) -> None:
        if known.prepared:
            return
        tokenizer = recipe.data.tokenizer
        known.locate(tokenizer.pretrained, "data.tokenizer.pretrained", tokenizer.revision)
        for _, state in input_states(recipe.data) if known.here else ():
            known.attempt(state)

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        from weftlm.pipeline.prepare import prepare  # noqa: PLC0415 - torch

        prepare(recipe.data, recipe.prepared_folder, rebuild=options.replace, progress=options.progress)

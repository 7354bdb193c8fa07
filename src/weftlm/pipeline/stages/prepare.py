"""The stage `prepare`: corpora to domains and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weftlm.corpora.reading import corpus_fingerprint
from weftlm.errors import ConfigError
from weftlm.pipeline.data_config import MANIFEST, data_identity
from weftlm.pipeline.stage import Stage, StageOptions, stages

if TYPE_CHECKING:
    from weftlm.pipeline.checks import Known
    from weftlm.pipeline.recipe import Recipe


@stages.register("prepare", does="corpora to domains and tokens", costs="one pass over the text for each step")
class Prepare(Stage):
    """Text read, de-duplicated, divided into domains, split and tokenised."""

    costly = True
    shared = True

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return data_identity(recipe.data)

    def outputs(self, recipe: Recipe) -> list[Path]:
        return [recipe.prepared_folder / MANIFEST]

    def check(self, recipe: Recipe, known: Known) -> None:
        data, tokenizer = recipe.data, recipe.data.tokenizer
        if not (recipe.prepared_folder / MANIFEST).exists():
            known.locate(tokenizer.pretrained, "data.tokenizer.pretrained", tokenizer.revision)
            for corpus in data.inputs().values() if known.here else ():
                known.attempt(corpus_fingerprint, corpus)
        target = bool(data.target_heldout) or (bool(data.target) and data.target_split.holds_out)
        gated = recipe.gating is not None
        if not (data.heldout or data.split.holds_out) and (gated or not target):
            what = "score" if gated else "evaluate on"
            raise ConfigError(f"nothing is held out to {what}; raise data.split.fraction, or give data.heldout")

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        from weftlm.pipeline.prepare import prepare  # noqa: PLC0415 - torch

        prepare(recipe.data, recipe.prepared_folder, rebuild=options.replace, progress=options.progress)

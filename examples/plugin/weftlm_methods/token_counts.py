"""A stage: the most frequent tokens of every domain, in a file of the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field, PositiveInt

from weftlm.config import Section
from weftlm.files import write_object
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.stage import Stage, StageOptions, stages


class TokenCountsConfig(Section):
    """Settings of the stage, under `stages: {token-counts: ...}` of a recipe."""

    most: PositiveInt = Field(20, description="Number of tokens listed per domain.")


@stages.register("token-counts", does="the most frequent tokens of every domain", costs="one pass over the tokens")
class TokenCounts(Stage):
    """Writes token-counts.json: for every domain, tokens and how often they occur in its training text."""

    needs: ClassVar[tuple[str, ...]] = ("prepare",)
    Config = TokenCountsConfig

    def outputs(self, recipe: Recipe) -> list[Path]:
        return [recipe.run / "token-counts.json"]

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        from weftlm.pipeline.prepared import PreparedData  # noqa: PLC0415 - torch, when the stage runs

        data = PreparedData.load(recipe.prepared_folder)
        found = {}
        for domain in data.domains:
            counts_V = np.bincount(domain.train.read(0, len(domain.train)))
            top = np.argsort(-counts_V, kind="stable")[: recipe.stages[self.name]["most"]]
            found[domain.name] = [[data.tokenizer.decode([token]), int(counts_V[token])] for token in top.tolist()]
        write_object(recipe.run / "token-counts.json", found)

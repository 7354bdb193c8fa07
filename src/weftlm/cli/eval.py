"""`weftlm eval`: measure a trained model on held-out text."""

from __future__ import annotations

from typing import Annotated

import typer

from weftlm.cli.dry_run import show_plan
from weftlm.cli.options import DryRunOption, JsonOption, RecipeArgument, SetOption, print_json, sets_table


def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens scored per set; 0 scores everything. Default: the recipe's.", show_default=False),
    ] = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Measure a trained model on held-out text of every domain and of the target.

    Gives nats per token, perplexity and bits per byte, each with its standard error over windows of text.
    """
    from weftlm.pipeline.recipe import load_recipe, require_training

    resolved = load_recipe(recipe, set_ or [])
    require_training(resolved)
    config = resolved.evaluation
    if max_tokens is not None:
        config = config.model_copy(update={"max_tokens_per_set": max_tokens or None})
    if dry_run:
        show_plan(resolved, json)
        return
    from weftlm.pipeline.train import evaluate_run

    result = evaluate_run(resolved.run, resolved, config).to_json()
    if json:
        print_json(result)
    else:
        sets_table(str(resolved.run), result)

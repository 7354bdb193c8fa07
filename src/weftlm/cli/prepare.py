"""`weftlm prepare`: read, de-duplicate, split and tokenise."""

from __future__ import annotations

from typing import Annotated

import typer

from weftlm.cli.dry_run import show_plan
from weftlm.cli.options import DryRunOption, JsonOption, RecipeArgument, SetOption, print_json, print_table


def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Prepare again even where the inputs changed since.")
    ] = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Read, de-duplicate, split and tokenise a recipe's corpora.

    What is prepared already and unchanged is reused. Everything that was skipped or dropped is counted and shown.
    """
    from weftlm.pipeline.recipe import load_recipe

    resolved = load_recipe(recipe, set_ or [])
    if dry_run:
        show_plan(resolved, json)
        return
    from weftlm.pipeline.prepare import prepare

    data = prepare(resolved.data, resolved.prepared_folder, rebuild=rebuild)
    if json:
        print_json(data.summary())
        return
    rows = [
        [name, f"{facts['documents']:,}", f"{facts['train_tokens']:,}", f"{facts['heldout_tokens']:,}"]
        for name, facts in data.summary()["sets"].items()
    ]
    print_table(str(resolved.prepared_folder), ["set", "documents", "train tokens", "held-out tokens"], rows)

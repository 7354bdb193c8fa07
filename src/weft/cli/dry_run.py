"""What `--dry-run` shows: the resolved recipe and what following it would do."""

from __future__ import annotations

import typer

from weft.cli.options import print_json, print_table
from weft.pipeline.recipe import Recipe, plan


def show_plan(recipe: Recipe, json: bool) -> None:
    """Print every key with its value, then parameters, tokens and steps.

    Raises:
        ConfigError: the recipe contradicts itself in a way that can be seen without reading anything.
    """
    described = plan(recipe)
    if json:
        print_json({"recipe": recipe.resolved(), "plan": described})
        return
    typer.echo(recipe.to_yaml())
    print_table("plan", ["what", "value"], [[name, f"{value}"] for name, value in described.items()])

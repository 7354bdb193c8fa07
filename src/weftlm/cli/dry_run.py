"""What `--dry-run` shows: the resolved recipe and what following it would do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from weftlm.cli.options import print_json, print_table, say_lines

if TYPE_CHECKING:
    from weftlm.pipeline.recipe import Recipe


def show_plan(recipe: Recipe, json: bool) -> None:
    """Print every key with its value, then what training, or making the experts, takes.

    Raises:
        ConfigError: the recipe contradicts itself in a way that can be seen without reading anything.
    """
    from weftlm.pipeline.recipe_plan import expert_plan, training_plan

    show(recipe.resolved(), recipe.to_yaml(), training_plan(recipe) if recipe.trains else expert_plan(recipe), json)


def show(resolved: Mapping[str, Any], text: str, described: Mapping[str, Any], json: bool) -> None:
    """Print a resolved recipe, as a mapping or as YAML, and what following it would do."""
    if json:
        print_json({"recipe": resolved, "plan": described})
        return
    say_lines(text)
    print_table("plan", ["what", "value"], [[name, f"{value}"] for name, value in described.items()])

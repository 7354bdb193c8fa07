"""How commands are registered: each yields its result for `--json`, and then prints it for people."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typer import Typer

from weftlm.cli import options
from weftlm.cli.output import print_json, say_yaml

if TYPE_CHECKING:
    from weftlm.pipeline.recipe import Recipe
else:
    Recipe = Any  # the sections of a recipe are imported once a command runs

__all__ = ["Recipe", "command", "recipe_command"]
Work = Callable[..., Iterator[Any]]
Topic = Literal["data", "training", "experts"]
"""The part of a recipe that a command works on, which the recipe must have."""

_RECIPE = Parameter("recipe", Parameter.KEYWORD_ONLY, annotation=options.RecipePath)
_SET, _DRY_RUN, _JSON = (
    Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
    for name, annotation, default in (
        ("set_", options.Set, None),
        ("dry_run", options.DryRun, False),
        ("json", options.Json, False),
    )
)


def command(group: Typer, name: str | None = None, *, plain: bool = False) -> Callable[[Work], Work]:
    """Register a function as a command with the option `--json`.

    The function yields its result once, as JSON values; with `--json` that is printed and the rest is left out. Of the
    processes that torchrun starts only the first prints.

    Args:
        group: Group of the command.
        name: Name of the command; the function's where None.
        plain: Whether people get the result as YAML too.
    """

    def register(work: Work) -> Work:
        def run(json: bool, **given: Any) -> None:
            for result in work(**given):
                if os.environ.get("RANK", "0") != "0":
                    return
                if json:
                    print_json(result)
                elif plain:
                    say_yaml(result)
                if json or plain:
                    return

        _sign(run, [*_parameters(work), _JSON])
        group.command(name or work.__name__, help=work.__doc__)(run)
        return work

    return register


def recipe_command(
    group: Typer, topic: Topic, name: str | None = None, *, plain: bool = False
) -> Callable[[Work], Work]:
    """Register a function of a checked recipe as a command, with the options `--set`, `--dry-run` and `--json`."""

    def register(work: Work) -> Work:
        def follow(recipe: Path, set_: list[str] | None, dry_run: bool, **given: Any) -> Iterator[Any]:
            from weftlm.pipeline.checks import check_recipe
            from weftlm.pipeline.recipe import load_recipe, require_experts

            resolved = load_recipe(recipe, set_ or [])
            if topic == "training":
                _ = resolved.trained
            elif topic == "experts":
                require_experts(resolved)
            check_recipe(resolved, ask=not dry_run, whole=False)
            yield from _described(resolved, topic) if dry_run else work(resolved, **given)

        follow.__name__, follow.__doc__ = work.__name__, work.__doc__
        _sign(follow, [_RECIPE, *_parameters(work)[1:], _SET, _DRY_RUN])
        command(group, name, plain=plain)(follow)
        return work

    return register


def _described(recipe: Recipe, topic: Topic) -> Iterator[Any]:
    """What `--dry-run` shows: every key of the recipe with its value, and the size of a training."""
    from weftlm.pipeline.stages.train import training_plan

    plan = {"plan": training_plan(recipe)} if topic in ("data", "training") and recipe.trains else {}
    yield {"recipe": recipe.resolved(), **plan}
    say_yaml({**recipe.resolved(), **plan})


def _parameters(work: Work) -> list[Parameter]:
    found = signature(work, eval_str=True).parameters.values()
    return [each.replace(kind=Parameter.KEYWORD_ONLY) for each in found]


def _sign(function: Any, parameters: list[Parameter]) -> None:
    function.__signature__ = Signature(parameters)  # which typer reads

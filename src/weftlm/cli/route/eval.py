"""`weftlm route eval`: routers beside each other, the base and the single experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from weftlm.cli import complete
from weftlm.cli.dry_run import show
from weftlm.cli.options import (
    DryRunOption,
    GpusOption,
    JsonOption,
    RayOption,
    RecipeArgument,
    SetOption,
    check_gpus,
    executor_for,
    names_of,
    print_json,
    print_table,
    say,
    windows,
    with_error,
)

if TYPE_CHECKING:
    from weftlm.evaluation.result import MeanResult
    from weftlm.pipeline.routes import RouteEvaluation

COLUMNS = 3
"""Columns of a table, so that it fits a terminal of 80 characters."""


def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    routers: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            autocompletion=complete.routers,
            help="Routers to compare, with options as phatgoose:k=1. Default: all the experts have the parts for.",
            show_default=False,
        ),
    ] = None,
    experts: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Experts to route among. Default: all.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens scored per set; 0 scores everything. Default: the recipe's.", show_default=False),
    ] = None,
    singles: Annotated[
        bool, typer.Option("--singles/--no-singles", help="Score every expert alone, for best single and oracle.")
    ] = True,
    ray: RayOption = False,
    gpus: GpusOption = 0.0,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Compare routers, the best single expert and the base on held-out text, in bits per byte.

    All are scored on the same windows; a standard error is over windows. Best single expert and oracle (the best expert
    of each set) are chosen on the very text they are scored on: they are bounds, not methods.
    """
    from weftlm.pipeline.checks import load_checked
    from weftlm.pipeline.recipe import require_experts
    from weftlm.pipeline.recipe_plan import expert_plan
    from weftlm.routing.config import parse_router, router_config

    check_gpus(ray, gpus)
    resolved = load_checked(recipe, set_ or [], needs=require_experts, ask=not dry_run)
    config = resolved.evaluation
    if max_tokens is not None:
        config = config.model_copy(update={"max_tokens_per_set": max_tokens or None})
    if dry_run:
        show(resolved.resolved(), resolved.to_yaml(), expert_plan(resolved), json)
        return
    compared = None if routers is None else names_of(routers)
    for each in compared or ():
        router_config(parse_router(each))
    from weftlm.pipeline.routes import evaluate_routes

    chosen = None if experts is None else names_of(experts)
    with executor_for(resolved, ray, gpus) as executor:
        found = evaluate_routes(resolved, compared, experts=chosen, config=config, singles=singles, executor=executor)
    if json:
        print_json(found.to_json())
    else:
        _print(found, str(resolved.library_folder))


def _print(found: RouteEvaluation, title: str) -> None:
    columns: dict[str, list[str]] = {}
    if found.base.generic is not None:
        columns["mean over domains"] = [_cell(row.generic) for row in found.rows.values()]
        columns["minus base"] = [_cell(difference["generic"]) for difference in found.minus_base.values()]
    for name in found.base.sets:
        columns[name] = [_cell(row.sets[name]) for row in found.rows.values()]
    names = list(columns)
    for first in range(0, len(names), COLUMNS):
        shown = names[first : first + COLUMNS]
        rows = [[label, *(columns[name][place] for name in shown)] for place, label in enumerate(found.rows)]
        print_table(f"{title}: bits per byte{windows(found.base.sequence_length)}", ["", *shown], rows)
    _print_tasks(found, title)
    for note in found.notes:
        say(f"note: {note}")
    if found.best_single is not None:
        say(f"best single: {found.best_single}")
        say("oracle: " + ", ".join(f"{expert} on {name}" for name, expert in found.oracle.items()))


def _print_tasks(found: RouteEvaluation, title: str) -> None:
    from weftlm.evaluation.tasks import mean_accuracy

    rows = {label: row.tasks for label, row in found.rows.items() if row.tasks}
    columns = {"mean over tasks": {label: with_error(*mean_accuracy(tasks)) for label, tasks in rows.items()}}
    for name in found.base.tasks:
        columns[name] = {label: with_error(t[name].accuracy, t[name].accuracy_se) for label, t in rows.items()}
    for first in range(0, len(columns) if rows else 0, COLUMNS):
        shown = list(columns)[first : first + COLUMNS]
        table = [[label, *(columns[name][label] for name in shown)] for label in rows]
        print_table(f"{title}: share of right answers", ["", *shown], table)


def _cell(value: MeanResult | None) -> str:
    return "-" if value is None else with_error(value.bits_per_byte, value.bits_per_byte_se)

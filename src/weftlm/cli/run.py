"""`weftlm run`: a whole project, stage by stage."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weftlm.cli import complete
from weftlm.cli.options import (
    DryRunOption,
    JsonOption,
    QuickOption,
    RecipeArgument,
    SetOption,
    number,
    print_json,
    print_table,
    say,
    say_lines,
    windows,
)
from weftlm.cli.status import show_status
from weftlm.pipeline.names import REPORT

if TYPE_CHECKING:
    from weftlm.pipeline.recipe import Recipe


def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STAGE",
            autocompletion=complete.stages,
            help="Make this stage and all later ones anew.",
            show_default=False,
        ),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(
            "--until",
            metavar="STAGE",
            autocompletion=complete.stages,
            help="Stop after this stage.",
            show_default=False,
        ),
    ] = None,
    processes: Annotated[int, typer.Option(help="Experts made at once.", min=1)] = 1,
    quick: QuickOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Carry a recipe through all its stages: data, base, experts, routers, robust gate, students, one report.

    What is done and unchanged is skipped; an interrupted run continues. A recipe has the stages of its sections: model,
    mixture and training train a base; experts make experts over it; routing compares routers; gating fits a robust gate
    and distils it; compare trains baselines. A costly stage whose settings changed is replaced only with --from.
    """
    from weftlm.pipeline.checks import check_recipe
    from weftlm.pipeline.quick import quick as cut_down
    from weftlm.pipeline.recipe import load_recipe
    from weftlm.pipeline.runner import run_project

    project = load_recipe(recipe, set_ or [])
    if quick:
        project = cut_down(project)
    if dry_run:
        check_recipe(project)
        _show_plan(project, from_, until, json)
        return
    found = run_project(project, from_stage=from_, until=until, processes=processes)
    from weftlm.pipeline.train import is_main_process

    if is_main_process():
        show_status(project, found, json)
        if not json and found[-1].state == "done":
            show_models(project)


def show_models(project: Recipe) -> None:
    """Print every model of a finished project, the best marked, and what to do next."""
    from weftlm.pipeline.models_table import read_evaluation

    evaluation = read_evaluation(project)
    models: dict[str, Any] = evaluation["models"]
    means = {
        name: facts["generic"]["bits_per_byte"] for name, facts in models.items() if facts.get("generic") is not None
    }
    measured = {name: mean for name, mean in means.items() if mean is not None}
    best = min(measured, key=measured.__getitem__) if measured else next(iter(models))
    print_table(
        f"{project.run}: bits per byte of held-out text, mean over domains{windows(evaluation.get('sequence_length'))}",
        ["model", "mean of domains", "target", ""],
        [
            [name, number(means.get(name)), number(_target(facts)), "best on the domains" if name == best else ""]
            for name, facts in models.items()
        ],
    )
    say(f"serve it: weftlm serve {shlex.quote(models[best]['path'])}")
    if (project.run / REPORT).exists():
        say(f"read about it: python -m webbrowser {shlex.quote(str(project.run / REPORT))}")


def _target(facts: dict[str, Any]) -> float | None:
    found: float | None = facts["sets"].get("target", {}).get("bits_per_byte")
    return found


def _show_plan(project: Recipe, from_: str | None, until: str | None, json: bool) -> None:
    from weftlm.pipeline.runner import plan_stages

    planned = plan_stages(project, from_stage=from_, until=until)
    if json:
        stages = [{**status.to_json(), "act": act} for status, act in planned]
        print_json({"recipe": project.resolved(), "stages": stages})
        return
    say_lines(project.to_yaml())
    print_table(
        f"{project.run}: what weftlm run would do",
        ["stage", "what", "now", "then", "why"],
        [[status.stage.name, status.stage.title, status.state, act, status.why] for status, act in planned],
    )

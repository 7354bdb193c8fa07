"""`weftlm run`, `status`, `plan`, `report`, `demo`: a whole project, stage by stage."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, Typer

from weftlm.cli import complete, options
from weftlm.cli.command import Recipe, command
from weftlm.cli.folders import takes
from weftlm.cli.output import print_rows, say, say_yaml, windows
from weftlm.planning.hardware import DEVICES

app = Typer()


@command(app)
def run(
    recipe: options.RecipePath,
    set_: options.Set = None,
    from_: Annotated[
        str | None,
        Option(
            "--from",
            metavar="STAGE",
            autocompletion=complete.stages,
            help="First stage to redo, with everything after it.",
        ),
    ] = None,
    until: Annotated[
        str | None, Option("--until", metavar="STAGE", autocompletion=complete.stages, help="Last stage to run.")
    ] = None,
    processes: options.Processes = 1,
    quick: options.Quick = False,
    dry_run: options.DryRun = False,
) -> Iterator[Any]:
    """Run all stages of a recipe; skip what is done, resume the rest.

    The stages follow from the recipe's sections: model, mixture and training train a base; experts makes experts over
    it; routing compares routers; gating fits a robust gate and distils it; compare trains baselines; a report ends it.
    A costly stage whose settings changed is replaced only with --from.
    """
    from weftlm.pipeline.quick import quick as cut_down
    from weftlm.pipeline.recipe import load_recipe
    from weftlm.pipeline.runner import run_project

    project = load_recipe(recipe, set_ or [])
    if quick:
        project = cut_down(project)
    if dry_run:
        yield from _planned(project, from_, until)
        return
    found = run_project(project, from_stage=from_, until=until, processes=processes)
    yield from _stages(project, [status.to_json() for status in found])
    if found[-1].state == "done":
        show_models(project)


def _planned(project: Recipe, from_: str | None = None, until: str | None = None) -> Iterator[Any]:
    """The resolved recipe, and what would be done with each stage."""
    from weftlm.pipeline.checks import check_recipe
    from weftlm.pipeline.runner import plan_stages

    check_recipe(project)
    planned = plan_stages(project, from_stage=from_, until=until)
    stages = [{**status.to_json(), "act": act} for status, act in planned]
    yield from _stages(project, stages, recipe=project.resolved())


def _stages(project: Recipe, stages: list[dict[str, Any]], **recipe: Any) -> Iterator[Any]:
    yield {"run": str(project.run), "stages": stages, **recipe}
    if recipe:
        say_yaml(recipe)
    columns = {"what": "title", "state": "state", **({"then": "act"} if recipe else {"s": "seconds"}), "why": "why"}
    print_rows(str(project.run), {each["stage"]: each for each in stages}, columns, first="stage")


@command(app)
def status(
    folder: Annotated[Path, Argument(metavar="RUN", help="Run folder of weftlm run.", callback=takes("project"))],
) -> Iterator[Any]:
    """Show which stages are done, running, stale or to do, and why.

    The recipe is the one weftlm run was last given there; texts and settings are compared with those of the results.
    """
    from weftlm.pipeline.recipe import open_run
    from weftlm.pipeline.runner import project_status

    project = open_run(folder)
    yield from _stages(project, [status.to_json() for status in project_status(project)])


def show_models(project: Recipe) -> None:
    """Print every model of a finished project, the best marked, and what to do next."""
    from weftlm.pipeline.heldout import read_evaluation
    from weftlm.pipeline.names import REPORT

    evaluation = read_evaluation(project)
    models: dict[str, Any] = evaluation["models"]
    means = {name: (facts.get("generic") or {}).get("bits_per_byte") for name, facts in models.items()}
    measured = {name: mean for name, mean in means.items() if mean is not None}
    best = min(measured, key=measured.__getitem__) if measured else next(iter(models))
    print_rows(
        f"{project.run}: bits per byte of held-out text, mean over domains{windows(evaluation.get('sequence_length'))}",
        {name: {**facts, "best": "best on the domains" if name == best else ""} for name, facts in models.items()},
        {"mean of domains": "generic.bits_per_byte", "target": "sets.target.bits_per_byte", "": "best"},
        first="model",
    )
    say(f"serve it: weftlm serve {shlex.quote(models[best]['path'])}")
    if (project.run / REPORT).exists():
        say(f"read about it: python -m webbrowser {shlex.quote(str(project.run / REPORT))}")


@command(app)
def plan(
    recipe: options.RecipePath,
    hardware: Annotated[
        str,
        Option(
            metavar="NxDEVICE",
            help=f"Machine: 8xH100, 2x8xA100-80 (machines x devices), or cpu. Known: {', '.join(DEVICES)}.",
        ),
    ] = "cpu",
    mfu: Annotated[
        float | None, Option(help="Part of the peak that matrix products reach. Default: by device.")
    ] = None,
    domains: Annotated[int | None, Option(min=1, help="Number of domains, where the text is not prepared yet.")] = None,
    experts: Annotated[int | None, Option(min=1, help="Number of experts. Default: one per domain.")] = None,
    data_tokens: Annotated[
        int | None, Option(min=1, help="Training tokens of the text, where it is not prepared yet.")
    ] = None,
    requests: Annotated[int, Option(min=1, help="Number of requests served at once.")] = 32,
    prompt: Annotated[
        int | None, Option(min=1, help="Length of a prompt in tokens. Default: a training sequence.")
    ] = None,
    new_tokens: Annotated[int, Option(min=1, help="Number of tokens generated for a request.")] = 256,
    set_: options.Set = None,
) -> Iterator[Any]:
    """Estimate time, memory and disk of a recipe on given hardware.

    Gives parameters, FLOPs, memory, traffic, disk and time of each stage, and what limits it. Nothing is downloaded or
    kept. For known accelerators figures follow from their data sheets; on the CPU a few steps of the recipe's own
    models are timed on the spot. What was assumed is printed below the table.
    """
    from rich.filesize import decimal

    from weftlm.pipeline.checks import check_recipe
    from weftlm.pipeline.recipe import load_recipe
    from weftlm.planning.hardware import parse_hardware
    from weftlm.progress import duration_text

    machine, checked = parse_hardware(hardware), load_recipe(recipe, set_ or [])
    check_recipe(checked, here=False, whole=False)
    from weftlm.planning.plan import Assumed, plan_recipe

    assumed = Assumed(domains, experts, data_tokens, requests, prompt, new_tokens)
    found = plan_recipe(checked, machine, name=str(recipe), mfu=mfu, assumed=assumed)
    yield found.to_json()
    rows = {
        stage.name: {
            "time": duration_text(stage.seconds) if stage.seconds else "-",
            "limit": stage.limit,
            "FLOPs": f"{stage.flops:.2e}" if stage.flops else "-",
            "memory": decimal(int(sum(stage.memory_bytes.values()))),
            "sent": decimal(int(stage.sent_bytes)),
            "disk": decimal(int(sum(stage.disk_bytes.values()))),
        }
        for stage in found.stages
    }
    rows["all"] = {"time": duration_text(found.seconds), "disk": decimal(int(found.disk_bytes))}
    columns = {name: name for name in ("time", "limit", "FLOPs", "memory", "sent", "disk")}
    print_rows(f"{found.recipe} on {found.hardware}", rows, columns, first="stage")
    say("memory: on the fullest device; sent: by one device; FLOPs and disk: in all")
    for stage in found.stages:
        sizes = {"memory": stage.memory_bytes, "disk": stage.disk_bytes}
        parts = {name: {what: decimal(int(size)) for what, size in each.items()} for name, each in sizes.items()}
        facts = {name: value for name, value in {**stage.facts, **parts}.items() if value}
        say_yaml({f"{stage.name}: {stage.what}": facts})
    say_yaml({"What will not work": found.problems, "Assumptions": found.assumptions})


@command(app, plain=True)
def report(
    runs: Annotated[
        list[Path], Argument(metavar="RUN...", help="Run folders, or recipes naming them.", callback=takes("run"))
    ],
    output: Annotated[
        Path | None,
        Option(
            "--output",
            "-o",
            help="Path of the page. Default: in the first folder report.html; compared.html of several runs, "
            "training.html of a project whose models are not measured yet.",
        ),
    ] = None,
    title: Annotated[str | None, Option(help="Title of the page.")] = None,
) -> Iterator[Any]:
    """Write one self-contained HTML page about runs or a project.

    The page needs no network: summary, mixture over time, alignments, loss curves, epochs and the resolved recipes.
    Unfinished runs are shown as far as they are.
    """
    from weftlm.pipeline.project_report import report_folders
    from weftlm.pipeline.recipe import load_recipe

    folders = [load_recipe(run).run if run.suffix in (".yaml", ".yml") else run for run in runs]
    yield {"report": str(report_folders(folders, output, title))}


_BITS = {"mean over domains": "generic.bits_per_byte", "target": "sets.target.bits_per_byte"}
_DEMO_TABLES = {
    "mixture": ("bits per byte by mixture", _BITS),
    "routing": ("bits per byte by router", _BITS),
    "robust": (
        "regret to the domain's own expert, nats",
        {"worst domain": "worst_domain", "worst": "worst", "mean over domains": "mean"},
    ),
}
"""Section of summary.json -> title of its table, and its columns."""


@command(app)
def demo(set_: options.Set = None, quick: options.Quick = False, dry_run: options.DryRun = False) -> Iterator[Any]:
    """Run all stages on built-in text, in about eight minutes.

    A mixture found while training, experts routed, a robust gate; with --quick in about two minutes, on two cores.
    Nothing is downloaded: the domains are assembled from the Python installation. Results go to runs/demo: report.html,
    summary.json, the model, baselines, experts, routed models, gate and students. Finished stages are reused.
    """
    from weftlm.files import read_object
    from weftlm.pipeline.names import SUMMARY
    from weftlm.pipeline.quick import demo_recipe
    from weftlm.pipeline.quick import quick as cut_down
    from weftlm.pipeline.runner import run_project

    project = demo_recipe(set_ or [])
    if quick:
        project = cut_down(project)
    if dry_run:
        yield from _planned(project)
        return
    say(f"about {'two' if quick else 'eight'} minutes on two cores; results in {project.run}", err=True)
    run_project(project, processes=min(2, os.cpu_count() or 1))
    summary = read_object(project.run / SUMMARY, "run the demonstration again") or {}
    yield summary
    for section, (title, columns) in _DEMO_TABLES.items():
        if rows := summary.get(section):
            length = next(iter(rows.values())).get("sequence_length") or summary["certificate"]["length"]
            print_rows(title + windows(length), rows, columns, first=section)
    show_models(project)

"""`weftlm plan`: what a recipe will cost on given hardware."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from weftlm.cli.options import JsonOption, RecipeArgument, SetOption, print_json, print_table, say
from weftlm.planning.hardware import DEVICES

if TYPE_CHECKING:
    from weftlm.planning.plan import Plan


def run(
    recipe: RecipeArgument,
    hardware: Annotated[
        str,
        typer.Option(
            metavar="NxDEVICE",
            help=f"Machine: 8xH100, 2x8xA100-80 (machines x devices), or cpu. Known: {', '.join(DEVICES)}.",
        ),
    ] = "cpu",
    mfu: Annotated[
        float | None, typer.Option(help="Part of the peak that matrix products reach; default by device.")
    ] = None,
    domains: Annotated[int | None, typer.Option(min=1, help="Domains, where the text is not prepared yet.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Experts; default: one per domain.")] = None,
    data_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the text.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests served at once.")] = 32,
    prompt: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt; default: a training sequence.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for a request.")] = 256,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Plan a recipe: parameters, FLOPs, memory, traffic, disk, time, and what limits each stage.

    Nothing is downloaded or kept. For known accelerators figures follow from their data sheets; on the CPU three steps
    of the recipe's own models are timed on the spot. What was assumed is printed below the table.
    """
    from weftlm.pipeline.checks import load_checked
    from weftlm.planning.hardware import parse_hardware

    machine, checked = parse_hardware(hardware), load_checked(recipe, set_ or [], here=False)
    from weftlm.planning.plan import Assumed, plan_recipe

    assumed = Assumed(domains, experts, data_tokens, requests, prompt, new_tokens)
    plan = plan_recipe(checked, machine, name=str(recipe), mfu=mfu, assumed=assumed)
    if json:
        print_json(plan.to_json())
    else:
        _show(plan)


def _show(plan: Plan) -> None:
    rows = [
        [
            stage.name,
            "-" if stage.time is None else duration(stage.time.seconds),
            stage.limit,
            f"{stage.flops:.2e}" if stage.flops else "-",
            size(stage.memory_bytes),
            size(stage.sent),
            size(stage.disk_bytes),
        ]
        for stage in plan.stages
    ]
    rows.append(["all", duration(plan.seconds), "", "", "", "", size(plan.disk_bytes)])
    print_table(
        f"{plan.recipe} on {plan.hardware}",
        ["stage", "time", "limit", "FLOPs", "memory", "sent", "disk"],
        rows,
    )
    say("memory: on the fullest device; sent: by one device; FLOPs and disk: in all")
    for stage in plan.stages:
        say("")
        say(f"{stage.name}: {stage.what}")
        for name, value in stage.facts.items():
            if value is None:
                continue
            say(f"  {name.replace('_', ' ')}: {_plain(name, value)}")
        for name, part in (("memory", stage.memory), ("disk", stage.disk)):
            if part:
                say(f"  {name}: " + ", ".join(f"{what} {size(value)}" for what, value in part.items()))
    if plan.problems:
        say("")
        say("What will not work")
        for problem in plan.problems:
            say(f"- {problem}")
    say("")
    say("Assumptions")
    for line in plan.assumptions:
        say(f"- {line}")


def _plain(name: str, value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{what} {_plain(name, inner)}" for what, inner in value.items())
    if isinstance(value, int | float) and "bytes" in name and "over" not in name:
        return size(float(value))
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if name.startswith("seconds") or name.endswith("seconds_from_disk"):
            return duration(value)
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)


def size(count: float) -> str:
    """Bytes for people, decimal."""
    if count <= 0:
        return "-"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} PB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"

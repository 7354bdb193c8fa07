"""`weftlm experts train`: an expert of every domain."""

from __future__ import annotations

from typing import Annotated, Any

import typer

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
    number,
    print_json,
    print_table,
)


def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="Make this expert only; repeatable.", show_default=False),
    ] = None,
    processes: Annotated[int, typer.Option(help="Experts made at once.", min=1)] = 1,
    ray: RayOption = False,
    gpus: GpusOption = 0.0,
    replace: Annotated[
        bool, typer.Option("--replace", help="Discard experts and unfinished work of other settings, data or seed.")
    ] = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Make an expert of every domain: a LoRA adapter, its gate, and statistics of its text.

    The recipe has an `experts` section: a recipe of weftlm train, whose model is then the base, or a small one with
    run, data and experts, where experts.base names the base. Each expert joins the library as soon as it is whole; run
    again, the command continues. Under torchrun the experts are dealt out to the ranks, with --ray to machines.
    """
    from weftlm.pipeline.checks import load_checked
    from weftlm.pipeline.recipe import require_experts
    from weftlm.pipeline.recipe_plan import expert_plan

    check_gpus(ray, gpus)
    resolved = load_checked(recipe, set_ or [], needs=require_experts, ask=not dry_run)
    if dry_run:
        from weftlm.pipeline.experts import check_experts

        check_experts(resolved)
        show(resolved.resolved(), resolved.to_yaml(), expert_plan(resolved), json)
        return
    from weftlm.pipeline.experts import train_experts
    from weftlm.pipeline.train import is_main_process

    with executor_for(resolved, ray, gpus, processes) as executor:
        result = train_experts(resolved, only=only, replace=replace, executor=executor)
    if not is_main_process():
        return
    if json:
        print_json(result)
        return
    rows = [[name, *_row(facts)] for name, facts in result["experts"].items()]
    print_table(
        f"{result['library']} over {result['base']}",
        ["expert", "domain", "", "before", "after", "unit", "windows", "step kept", "s"],
        rows,
    )


def _row(facts: dict[str, Any]) -> list[str]:
    losses, adapter = facts["losses"] or {}, facts["adapter"] or {}
    before, after = losses.get("before") or {}, losses.get("after") or {}
    unit = "bits_per_byte" if after.get("bits_per_byte") is not None else "nats_per_token"
    return [
        facts["domain"],
        facts["status"],
        number(before.get(unit)),
        number(after.get(unit)),
        unit.replace("_per_", "/") if after else "-",
        str(losses.get("sequence_length", "-")),
        f"{adapter['kept_step']:,} of {adapter['steps']:,}" if adapter else "-",
        number(sum(adapter["seconds"].values()), 0) if adapter else "-",
    ]

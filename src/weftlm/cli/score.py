"""`weftlm score`: every expert's log-probability of held-out text and of samples, once."""

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
    windows,
)

COLUMNS = 4
"""Experts in a table, so that it fits a terminal of 80 characters."""


def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Throw away scores of other experts, text or settings.")
    ] = False,
    ray: RayOption = False,
    gpus: GpusOption = 0.0,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Score the domains' held-out text and samples of every expert under every expert, once.

    The scores go to `scores` in the run folder; gates are fitted on them without running an expert again. Run again
    after an interruption, the command continues. Under torchrun the ranks share the work.
    """
    from weftlm.pipeline.checks import load_checked
    from weftlm.pipeline.recipe import require_experts
    from weftlm.pipeline.recipe_plan import gate_plan

    check_gpus(ray, gpus)
    resolved = load_checked(recipe, set_ or [], needs=require_experts, ask=not dry_run)
    if dry_run:
        show(resolved.resolved(), resolved.to_yaml(), gate_plan(resolved), json)
        return
    from weftlm.pipeline.gating import score_experts
    from weftlm.pipeline.train import is_main_process

    with executor_for(resolved, ray, gpus) as executor:
        result = score_experts(resolved, overwrite=overwrite, executor=executor)
    if not is_main_process():
        return
    if json:
        print_json(result)
        return
    _print(result)


def _print(result: dict[str, Any]) -> None:
    domains, experts = result["domains"], result["experts"]
    sizes = [[name, f"{facts['sequences']:,}", f"{facts['tokens']:,}"] for name, facts in domains.items()]
    sizes += [
        [f"samples of {name}", f"{facts['sequences']:,}", f"{facts['tokens']:,}"]
        for name, facts in result["samples"].items()
    ]
    print_table(f"{result['folder']}: windows of {result['length']} tokens", ["text", "sequences", "tokens"], sizes)
    for first in range(0, len(experts), COLUMNS):
        shown = experts[first : first + COLUMNS]
        rows = [[name, *(number(facts["nats_per_token"][e]) for e in shown)] for name, facts in domains.items()]
        print_table(f"nats per token, by expert{windows(result['length'])}", ["domain", *shown], rows)

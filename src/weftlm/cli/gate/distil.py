"""`weftlm gate distil`: what can be served of a gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from weftlm.cli.dry_run import show
from weftlm.cli.options import (
    DryRunOption,
    JsonOption,
    RecipeArgument,
    SetOption,
    number,
    print_json,
    print_table,
    say,
    windows,
)
from weftlm.pipeline.names import GATE_PAGE

if TYPE_CHECKING:
    from weftlm.pipeline.recipe import Recipe


def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    direct: Annotated[
        bool,
        typer.Option("--direct", help="Train a causal gate on the minimax objective itself; no gate is distilled."),
    ] = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Make causal models of the fitted gate: over all experts, over the best few per token, and a dense one.

    Each goes to a folder of its own in `students` in the run folder, which from_pretrained loads and generate drives.
    Run again after an interruption, the command continues.
    """
    from weftlm.pipeline.checks import load_checked
    from weftlm.pipeline.recipe import require_experts
    from weftlm.pipeline.recipe_plan import student_plan

    resolved = load_checked(recipe, set_ or [], needs=require_experts, ask=not dry_run)
    if dry_run:
        show(resolved.resolved(), resolved.to_yaml(), student_plan(resolved, direct=direct), json)
        return
    from weftlm.pipeline.students import distil_gate

    result = distil_gate(resolved, direct=direct)
    if json:
        print_json(result)
        return
    _print(result, resolved)


def _print(result: dict[str, Any], recipe: Recipe) -> None:
    offsets = result["offsets"] if isinstance(result["offsets"], str) else "values"
    print_table(
        f"held-out sequences: nats/{result['unit']}, offsets {offsets}{windows(result.get('length'))}",
        ["model", "worst domain", "worst", "mean", "KL to the gate, nats/sequence"],
        [
            [
                name,
                row["worst_domain"],
                number(row["worst"]),
                number(row["mean"]),
                f"{number(row['kl'])} ± {number(row['kl_error'])}" if "kl" in row else "-",
            ]
            for name, row in result["rows"].items()
        ],
    )
    for name, row in result["rows"].items():
        if "model" in row:
            say(f"{name}: {row['model']}")
    say(f"page: {recipe.run / GATE_PAGE}")

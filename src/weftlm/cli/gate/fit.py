"""`weftlm gate fit`: the robust gate, from scores alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from weftlm.pipeline.recipe import Recipe


def run(
    recipe: RecipeArgument, set_: SetOption = None, dry_run: DryRunOption = False, json: JsonOption = False
) -> None:
    """Fit the gate that is best against the worst mixture of domains, on the scores of weftlm score.

    No expert is run, so that it takes minutes on a CPU whatever the experts' size. The result goes to `gate` in the run
    folder. Run again after an interruption, the command continues; with other settings it fits anew.
    """
    from weftlm.pipeline.checks import load_checked
    from weftlm.pipeline.recipe import require_experts
    from weftlm.pipeline.recipe_plan import gate_plan

    resolved = load_checked(recipe, set_ or [], needs=require_experts, ask=not dry_run)
    if dry_run:
        show(resolved.resolved(), resolved.to_yaml(), gate_plan(resolved), json)
        return
    from weftlm.pipeline.gating import fit_gate

    result = fit_gate(resolved)
    if json:
        print_json(result)
        return
    _print(result, resolved)


def _print(result: dict[str, Any], recipe: Recipe) -> None:
    rows = [
        [name, f"{facts['sequences']:,}", number(facts["value"]), number(facts["lam"], 3)]
        for name, facts in result["domains"].items()
    ]
    print_table(
        f"{recipe.gate_folder}: {result['gate']['gate']}{windows(result.get('length'))}",
        ["domain", "sequences", f"nats/{result['unit']}", "lambda"],
        rows,
    )
    low, high = result["z_ci"]
    say(f"worst case: {number(result['worst'])} nats/{result['unit']}; worst domain: {result['worst_domain']}")
    stopped = "; the fit stopped there" if result["stopped_early"] else ""
    say(f"gap after {result['steps']:,} steps: {number(result['gap'])} ({result['gap_kind']}){stopped}")
    say(f"Z: {number(result['z'])}, 95 % from {number(low)} to {number(high)} ({result['z_source']})")
    say("measured on the sequences of the fit; weftlm gate certify measures on held-out ones")

"""`weftlm experts gate`: one expert's gate again."""

from __future__ import annotations

from typing import Annotated

import typer

from weftlm.cli.dry_run import show
from weftlm.cli.options import DryRunOption, JsonOption, RecipeArgument, SetOption, number, print_json, say


def run(
    recipe: RecipeArgument,
    expert: Annotated[str, typer.Argument(metavar="EXPERT", help="The expert's name in the library.")],
    domain: Annotated[
        str | None,
        typer.Option(
            help="The domain whose text the expert is for. Default: the one it was made from, or of its name.",
            show_default=False,
        ),
    ] = None,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Train one expert's gate again, and collect its statistics, on its own domain alone.

    The adapter stays as it is and no other expert is read. An imported adapter gets its gate in the same way. Settings
    are experts.gate, experts.statistics_examples and experts.embedder: --set experts.gate.steps=300.
    """
    from weftlm.pipeline.recipe import load_recipe, require_experts
    from weftlm.pipeline.recipe_plan import expert_plan

    resolved = load_recipe(recipe, set_ or [])
    require_experts(resolved)
    if dry_run:
        show(resolved.resolved(), resolved.to_yaml(), {**expert_plan(resolved), "expert": expert}, json)
        return
    from weftlm.pipeline.experts import gate_expert

    result = gate_expert(resolved, expert, domain=domain)
    if json:
        print_json(result)
        return
    gate, statistics = result["gate"], result["statistics"]
    say(
        f"{expert}: gate trained on {result['domain']}, {gate['steps']} steps, loss of a batch "
        f"{number(gate['first_loss'])} at first and {number(gate['last_loss'])} at last"
    )
    if statistics is not None:
        say(f"statistics of {statistics['examples']:,} windows of {statistics['sequence_length']} tokens")

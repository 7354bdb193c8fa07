"""`weftlm gate certify`: how good the gate is, and how good any could be."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from weftlm.pipeline.names import CERTIFICATE, GATE_PAGE

if TYPE_CHECKING:
    from weftlm.gating.certificate import Certificate, Figure
    from weftlm.pipeline.recipe import Recipe


def run(
    recipe: RecipeArgument, set_: SetOption = None, dry_run: DryRunOption = False, json: JsonOption = False
) -> None:
    """Measure the fitted gate on held-out sequences: worst case, gap, Z, and the capacity no model can be below.

    Every figure says whether it is a bound, an estimate or exact. The certificate is also written to
    gate/certificate.json in the run folder, and a page about the gate to gate/report.html.
    """
    from weftlm.pipeline.checks import load_checked
    from weftlm.pipeline.recipe import require_experts
    from weftlm.pipeline.recipe_plan import gate_plan

    resolved = load_checked(recipe, set_ or [], needs=require_experts, ask=not dry_run)
    if dry_run:
        show(resolved.resolved(), resolved.to_yaml(), gate_plan(resolved), json)
        return
    from weftlm.pipeline.gating import certify_gate

    found = certify_gate(resolved)
    if json:
        print_json(found.to_json())
        return
    _print(found, resolved)


def _print(found: Certificate, recipe: Recipe) -> None:
    named = {
        "worst case": found.worst,
        "against lambda": found.at_lam,
        "least against lambda": found.lower,
        "gap": found.gap,
        "capacity": found.capacity,
        "Z": found.z,
    }
    figures = {name: figure for name, figure in named.items() if figure is not None}
    print_table(
        f"{recipe.gate_folder / CERTIFICATE}: nats/{found.unit}, offsets {found.offsets}{windows(found.length)}",
        ["figure", "value", "95 %", "is"],
        [
            [name, number(figure.value), _interval(figure.low, figure.high), figure.label]
            for name, figure in figures.items()
        ],
    )
    print_table(
        f"held-out sequences{windows(found.length)}",
        ["domain", "sequences", "cross-entropy", "minus offset", "95 %", "lambda"],
        [
            [
                row.name,
                f"{row.sequences:,}",
                number(row.cross_entropy),
                number(row.value),
                _interval(row.low, row.high),
                number(row.lam, 3),
            ]
            for row in found.domains
        ],
    )
    say(f"worst domain: {found.worst_domain}")
    for name, figure in figures.items():
        say(f"{name}: {_meaning(figure)}")
    say(f"page: {recipe.run / GATE_PAGE}")


def _meaning(figure: Figure) -> str:
    return f"{figure.label}; {figure.how}"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None and high is None else f"{number(low)} to {number(high)}"

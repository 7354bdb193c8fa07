"""`weft demo`: the main job on built-in text."""

from __future__ import annotations

import typer

from weft.cli.dry_run import show_plan
from weft.cli.options import DryRunOption, JsonOption, SetOption, number, print_json, print_table
from weft.pipeline.demo import demo_recipe, run_demo


def run(set_: SetOption = None, dry_run: DryRunOption = False, json: JsonOption = False) -> None:
    """Run the main jobs on built-in text: three mixtures compared, experts and every router, a robust gate.

    Nothing is downloaded: the domains are assembled from the Python installation. Results go to runs/demo: report.html,
    summary.json, one run folder per mixture, the experts in pool/experts. Finished parts are reused.
    """
    recipe = demo_recipe(set_ or [])
    if dry_run:
        show_plan(recipe, json)
        return
    summary = run_demo(recipe)
    if json:
        print_json(summary)
        return
    mixture, routing = summary["mixture"], summary["routing"]
    rows = [
        [
            name,
            f"{number(mixture['target_bpb'][name])} ± {number(mixture['target_bpb_se'][name])}",
            number(mixture["generic_bpb"][name]),
            number(mixture["epochs_of_the_most_read_domain"][name], 1),
            number(mixture["seconds"][name]["train"] + mixture["seconds"][name]["alignment"], 0),
            number(mixture["seconds"][name]["alignment"], 1),
        ]
        for name in mixture["target_bpb"]
    ]
    print_table(
        f"bits per byte after {mixture['train_tokens']:,} training tokens",
        ["mixture", "target", "mean of domains", "epochs of the most read", "training s", "of it alignment s"],
        rows,
    )
    print_table(
        f"bits per byte of {len(routing['experts'])} experts over the uniform mixture's model, by router",
        ["router", "mean of domains", "text no expert saw (the target)"],
        [
            [label.replace("_", " "), number(value), number(routing["unseen_bpb"].get(label))]
            for label, value in sorted(routing["heldout_bpb"].items(), key=lambda row: -row[1])
        ],
    )
    typer.echo(f"a routed forward pass takes {routing['relative_forward_time']:.2f} times the base's")
    robust = summary["robust"]
    print_table(
        f"regret to the domain's own expert, nats/{robust['unit']}, on held-out text",
        ["one model for all domains", "worst domain", "its regret", "mean of domains"],
        [
            [name.replace("_", " "), robust["worst_domain"][name], number(worst), number(robust["mean_regret"][name])]
            for name, worst in robust["worst_domain_regret"].items()
        ],
    )
    typer.echo(
        f"capacity between the experts: {number(robust['capacity_bound'])}; Z of the gate: {number(robust['z'])}"
    )
    typer.echo(f"report: {recipe.run / 'report.html'}")

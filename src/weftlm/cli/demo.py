"""`weftlm demo`: the main job on built-in text."""

from __future__ import annotations

from weftlm.cli.dry_run import show_plan
from weftlm.cli.options import (
    DryRunOption,
    JsonOption,
    QuickOption,
    SetOption,
    number,
    print_json,
    print_table,
    say,
    windows,
)


def run(
    set_: SetOption = None, quick: QuickOption = False, dry_run: DryRunOption = False, json: JsonOption = False
) -> None:
    """Run the whole pipeline on built-in text: a mixture found while training, experts routed, a robust gate.

    Nothing is downloaded: the domains are assembled from the Python installation. Results go to runs/demo: report.html,
    summary.json, the model, its baselines, experts, routed models, gate and students. Finished stages are reused.
    """
    from weftlm.pipeline.demo import demo_recipe, run_demo
    from weftlm.pipeline.quick import quick as cut_down

    recipe = demo_recipe(set_ or [])
    if quick:
        recipe = cut_down(recipe)
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
        f"bits per byte after {mixture['train_tokens']:,} training tokens{windows(mixture.get('sequence_length'))}",
        ["mixture", "target", "mean of domains", "epochs of the most read", "training s", "of it alignment s"],
        rows,
    )
    under = recipe.expert_settings.baseline or recipe.trained[1].policy
    print_table(
        f"bits per byte of {len(routing['experts'])} experts over the model of the mixture {under}, by router"
        f"{windows(routing.get('sequence_length'))}",
        ["router", "mean of domains", "text no expert saw (the target)"],
        [
            [label.replace("_", " "), number(value), number(routing["unseen_bpb"].get(label))]
            for label, value in sorted(routing["heldout_bpb"].items(), key=lambda row: -row[1])
        ],
    )
    if (times := routing["relative_forward_time"]) is not None:
        say(f"a routed forward pass takes {times:.2f} times the base's")
    robust = summary["robust"]
    print_table(
        f"regret to the domain's own expert, nats/{robust['unit']}, on held-out text{windows(robust.get('length'))}",
        ["one model for all domains", "worst domain", "its regret", "mean of domains"],
        [
            [name.replace("_", " "), robust["worst_domain"][name], number(worst), number(robust["mean_regret"][name])]
            for name, worst in robust["worst_domain_regret"].items()
        ],
    )
    say(f"capacity between the experts: {number(robust['capacity_bound'])}; Z of the gate: {number(robust['z'])}")
    say(f"report: {recipe.run / 'report.html'}")

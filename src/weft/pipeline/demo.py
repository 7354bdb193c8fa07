"""The demonstration on built-in text: three mixtures side by side, experts and every router over them, a gate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import yaml

from weft.config import apply_overrides
from weft.errors import ConfigError
from weft.files import write_whole
from weft.mixture.policy import build_policy
from weft.pipeline.demo_gating import gate_demo
from weft.pipeline.demo_routing import route_demo
from weft.pipeline.recipe import Recipe, make_recipe
from weft.pipeline.report import report_runs
from weft.pipeline.train import run_training

POLICIES = ("uniform", "importance", "dga")
"""What is compared, each as registered; `dga` is the recipe's own mixture."""
BASE_RUN = "uniform"
"""The run whose model the experts adapt: a generalist."""


def demo_recipe(overrides: Sequence[str] = ()) -> Recipe:
    """The recipe the demonstration follows, `demo.yaml` beside this file."""
    text = resources.files("weft.pipeline").joinpath("demo.yaml").read_text(encoding="utf-8")
    return make_recipe(apply_overrides(yaml.safe_load(text), overrides))


def run_demo(recipe: Recipe) -> dict[str, Any]:
    """Train the recipe's model on each mixture, experts over one of the models, and a robust gate over the experts.

    Writes report.html and summary.json beside the runs. What is finished already is reused.

    Returns:
        summary.json as a mapping.
    """
    if recipe.mixture.policy != "dga" or recipe.training.exhaustion != "repeat":
        raise ConfigError(
            f"the demonstration compares {', '.join(POLICIES)} on equal tokens; `mixture` is its dga run's section; "
            f"policy {recipe.mixture.policy} with exhaustion {recipe.training.exhaustion} wants a recipe of its own"
        )
    folder = recipe.run
    results = {}
    for policy in POLICIES:
        mixture = recipe.mixture
        if policy != "dga":
            mixture = build_policy({"policy": policy, "update_every_steps": mixture.update_every_steps}).config
        results[policy] = run_training(recipe.model_copy(update={"mixture": mixture, "run": folder / policy}))
    base, pool = folder / BASE_RUN, folder / "pool"
    routing, routing_facts = route_demo(recipe, base, pool)
    robust, gating_facts = gate_demo(recipe, base, pool, len(routing["experts"]))
    report_runs(
        [folder / policy for policy in POLICIES],
        folder / "report.html",
        "A mixture found while training, experts routed, and a robust gate",
        routing=routing_facts,
        gating=gating_facts,
    )
    summary = {"mixture": summarise(results), "routing": routing, "robust": robust}
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def summarise(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of summary.json's `mixture` section."""
    tokens = {result["train_tokens"] for result in results.values()}
    assert len(tokens) == 1, f"the runs compared trained on different numbers of tokens: {tokens}"
    return {
        "target_bpb": {name: result["sets"]["target"]["bits_per_byte"] for name, result in results.items()},
        "target_bpb_se": {name: result["sets"]["target"]["bits_per_byte_se"] for name, result in results.items()},
        "generic_bpb": {name: result["generic"]["bits_per_byte"] for name, result in results.items()},
        "train_tokens": tokens.pop(),
        "seconds": {
            name: {part: round(seconds, 2) for part, seconds in result["seconds"].items()}
            for name, result in results.items()
        },
        "weights": {name: result["weights"] for name, result in results.items()},
        "epochs_of_the_most_read_domain": {name: max(result["epochs"].values()) for name, result in results.items()},
    }

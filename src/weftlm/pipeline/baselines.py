"""The baselines of a project's model and gate, trained on the same data for as many tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weftlm.pipeline.experts import expert_domains
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.recipe import MONOLITH, Recipe
from weftlm.pipeline.train import run_training


def train_baselines(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Train the recipe's model on each other mixture; what is finished is reused.

    Returns:
        each one's result.json, by policy.
    """
    return {policy.policy: run_training(recipe.baseline(policy)) for policy in recipe.compare.mixtures}


def train_monolith(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Train the gate's baseline: one model, from the experts' base on, for as many tokens as all experts together.

    Returns:
        its result.json.
    """
    data = prepare(recipe.data, recipe.prepared_folder, progress=progress)
    experts = expert_domains(data.domains, recipe.expert_settings.domains)
    return run_training(recipe.monolith(len(experts)))


def baseline_folders(recipe: Recipe) -> dict[str, Path]:
    """Where the finished baselines lie, by policy, the monolith last."""
    names = [policy.policy for policy in recipe.compare.mixtures] + ([MONOLITH] if recipe.trains_monolith else [])
    folders = {name: recipe.baselines_folder / name for name in names}
    return {name: folder for name, folder in folders.items() if (folder / "result.json").exists()}

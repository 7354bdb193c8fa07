"""The rivals of a project's model and gate, trained on the same data for as many tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weftlm.pipeline.experts import expert_domains
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.project import MONOLITH, Project
from weftlm.pipeline.train import run_training


def train_rivals(project: Project) -> dict[str, dict[str, Any]]:
    """Train the recipe's model on each other mixture; what is finished is reused.

    Returns:
        each one's result.json, by policy.
    """
    return {policy.policy: run_training(project.rival(policy)) for policy in project.mixtures}


def train_monolith(project: Project, *, progress: bool = True) -> dict[str, Any]:
    """Train the gate's rival: one model, from the experts' base on, for as many tokens as all experts together.

    Returns:
        its result.json.
    """
    data = prepare(project.data, project.prepared_folder, progress=progress)
    experts = expert_domains(data.domains, project.pool_recipe.experts.domains)
    return run_training(project.monolith_recipe(len(experts)))


def rival_folders(project: Project) -> dict[str, Path]:
    """Where the finished rivals lie, by policy, the monolith last."""
    names = [policy.policy for policy in project.mixtures] + ([MONOLITH] if project.monolith else [])
    folders = {name: project.rivals_folder / name for name in names}
    return {name: folder for name, folder in folders.items() if (folder / "result.json").exists()}

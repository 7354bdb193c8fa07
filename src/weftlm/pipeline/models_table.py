"""Every model of a project on the same held-out text, and the monolith on the sequences no gate was fitted on.

<run>/evaluation.json       the results
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from weftlm.evaluation.suite import SuiteResult
from weftlm.experts.lora import load_trained
from weftlm.files import write_object
from weftlm.gating.problem import measure
from weftlm.pipeline.any_model import open_model
from weftlm.pipeline.baselines import baseline_folders
from weftlm.pipeline.gating import open_scores
from weftlm.pipeline.heldout import HeldOut, difference, read_measured
from weftlm.pipeline.names import EVALUATION
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import MONOLITH, Recipe
from weftlm.pipeline.students import held_out_problem, log_likelihoods, read_students, table_row
from weftlm.progress import ProgressBar
from weftlm.reporting.score_table import Role
from weftlm.training.runtime import choose_runtime

BASE = "base"


@dataclass(frozen=True)
class Place:
    """A model that a table compares.

    Attributes:
        path: Folder or hub name.
        role: Role in the tables of the report.
        settings: Revision and data type of a model that was not made here.
    """

    path: Path | str
    role: Role
    settings: Mapping[str, Any] = field(default_factory=dict)


def base_of(recipe: Recipe) -> str | None:
    """The name in tables of the model that the experts are over; None where a project makes none."""
    if not recipe.makes_experts:
        return None
    baseline = recipe.expert_settings.baseline
    return BASE if baseline is None else f"baseline: {baseline}"


def models_of(recipe: Recipe) -> dict[str, Place]:
    """The models a project has made so far, by what a table calls them.

    The recipe's own model is `base`, and `mixture: POLICY` where its experts are over another.
    """
    base = base_of(recipe)
    found: dict[str, Place] = {}

    def add(name: str, path: Path | str, role: Role, settings: Mapping[str, Any] | None = None) -> None:
        found[name] = Place(path, "base" if name == base else role, settings or {})

    given = recipe.expert_settings.base if recipe.makes_experts else None
    if recipe.mixture is not None and (recipe.run / "result.json").exists():
        own = BASE if given is None and base in (None, BASE) else f"mixture: {recipe.mixture.policy}"
        add(own, recipe.run / "model", "base" if own == BASE else "baseline")
    if given is not None:
        experts = recipe.expert_settings
        add(BASE, recipe.base, "base", {"revision": experts.revision, "dtype": experts.dtype})
    for name, folder in baseline_folders(recipe).items():
        add(f"baseline: {name}", folder / "model", "baseline")
    if not recipe.has_experts:
        return found
    for source in recipe.gating_settings.pool or ():
        if source.library is None and source.model is not None:
            settings = {"revision": source.revision, "dtype": recipe.expert_settings.dtype}
            add(f"expert: {source.name}", source.model, "expert", settings)
    if recipe.makes_experts:
        for router in recipe.routing_settings.build:
            if (folder := recipe.routed_folder(router)).is_dir():
                add(f"routed: {router}", folder, "router")
    for name, row in read_students(recipe).items():
        add(f"gate: {name}", Path(row["model"]), "student")
    return found


def evaluate_models(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Measure every model on the held-out text of every domain and of the target, all on the same windows.

    Returns:
        What evaluation.json holds: sequence_length; base: `base_of`; models, by name: path, kind, role, experts,
        `SuiteResult.to_json`, and difference to the base (`heldout.difference`); monolith: its row among the gates
        (`table_row`), or None.
    Raises:
        WeftError: a model cannot be opened or measured.
    """
    data = PreparedData.load(recipe.prepared_folder)
    training = recipe.training or recipe.expert_settings.training
    length = training.sequence_length
    if recipe.has_experts:
        length = min(length, recipe.expert_settings.training.sequence_length)
    device = choose_runtime(training, parameters=0).device
    heldout = HeldOut.of(recipe, data, recipe.evaluation, length, device)
    models = models_of(recipe)
    found: dict[str, Any] = {}
    results: dict[str, SuiteResult] = {}
    with ProgressBar("evaluate", total=len(models), unit="models", enabled=progress) as counter:
        for name, place in models.items():
            opened = open_model(place.path, device=str(device), encoder_decoder=True, **place.settings)
            results[name] = heldout.score(opened.model, opened.tokenizer)
            found[name] = {
                "path": str(place.path), "kind": opened.kind, "role": place.role, "experts": list(opened.experts),
                **results[name].to_json(),
            }  # fmt: skip
            counter.advance()
    base = results.get(base_of(recipe) or BASE)
    for name, result in results.items():
        if base is not None and result is not base:
            found[name]["difference"] = difference(result, base)
    value = {
        "sequence_length": length, "base": base_of(recipe), "models": found, MONOLITH: _monolith_row(recipe),
    }  # fmt: skip
    write_object(recipe.run / EVALUATION, value)
    return value


def read_evaluation(recipe: Recipe) -> dict[str, Any]:
    """What `evaluate_models` found; errors as `read_measured`."""
    return read_measured(recipe.run / EVALUATION, "evaluate")


@torch.inference_mode()
def _monolith_row(recipe: Recipe) -> dict[str, Any] | None:
    """The monolith on the sequences no gate was fitted on."""
    folder = recipe.baselines_folder / MONOLITH
    if not recipe.has_experts or recipe.gating is None or not (folder / "result.json").exists():
        return None
    scores = open_scores(recipe, causal=True)
    problem = held_out_problem(scores, recipe.gating_settings)
    device = choose_runtime(recipe.expert_settings.training, parameters=0).device
    model = load_trained(folder / "model").to(device)
    logs = [log_likelihoods(model, one) for one in scores.split.held_domains.values()]
    return {**table_row(measure(logs, problem), problem), "role": "baseline"}

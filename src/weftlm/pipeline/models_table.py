"""Every model of a project on the same held-out text, and the monolith on the sequences no gate was fitted on.

<run>/evaluation.json       the results
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from weftlm.evaluation.choices import mean_accuracy
from weftlm.evaluation.suite import SuiteResult
from weftlm.experts.lora import load_trained
from weftlm.files import write_object
from weftlm.pipeline.any_model import open_model
from weftlm.pipeline.gating import open_scores
from weftlm.pipeline.heldout import HeldOut, difference, read_measured
from weftlm.pipeline.names import EVALUATION, MONOLITH
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.students import held_out_problem, model_row, read_students
from weftlm.progress import ProgressBar
from weftlm.reporting.score_table import Role
from weftlm.training.runtime import choose_runtime

BASE = "base"


class Place(NamedTuple):
    """A model that a table compares: folder or hub name, role in the table, and how to open it."""

    path: Path | str
    role: Role
    settings: Mapping[str, Any] = {}


def baseline_folders(recipe: Recipe) -> dict[str, Path]:
    """Folders of the finished baselines, by policy, the monolith last."""
    names = [policy.policy for policy in recipe.compare.mixtures] + ([MONOLITH] if recipe.trains_monolith else [])
    folders = {name: recipe.baselines_folder / name for name in names}
    return {name: folder for name, folder in folders.items() if (folder / "result.json").exists()}


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
    base, experts, found = base_of(recipe), recipe.expert_settings, dict[str, Place]()
    dtype = {"dtype": experts.dtype}
    given = experts.base is not None and recipe.makes_experts
    if recipe.mixture is not None and (recipe.run / "result.json").exists():
        own = f"mixture: {recipe.mixture.policy}" if given or base not in (None, BASE) else BASE
        found[own] = Place(recipe.run / "model", "baseline" if own != BASE else "base")
    if given:
        found[BASE] = Place(recipe.base, "base", {"revision": experts.revision, **dtype})
    for name, folder in baseline_folders(recipe).items():
        name = f"baseline: {name}"
        found[name] = Place(folder / "model", "base" if name == base else "baseline")
    for source in (recipe.gating_settings.pool or ()) if recipe.has_experts else ():
        if source.library is None and source.model is not None:
            found[f"expert: {source.name}"] = Place(source.model, "expert", {"revision": source.revision, **dtype})
    for router in recipe.routing_settings.build if recipe.makes_experts else ():
        if (folder := recipe.routed_folder(router)).is_dir():
            found[f"routed: {router}"] = Place(folder, "router")
    for name, row in read_students(recipe).items() if recipe.has_experts else ():
        found[f"gate: {name}"] = Place(row["model"], "student")
    return found


def compared(
    results: Mapping[str, SuiteResult], roles: Mapping[str, Role], base: str | None
) -> dict[str, dict[str, Any]]:
    """Rows of a table of models on the same held-out text.

    Args:
        results: Result of each model by its name.
        roles: Role of each in the tables of the report.
        base: Name of the model that the others are compared with; None where there is none.
    Returns:
        By model: role, `SuiteResult.to_json`, difference to the base (`heldout.difference`), and mean_accuracy where
        there are tasks.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        rows[name] = {"role": roles[name], **result.to_json()}
        if base is not None and base in results and name != base:
            rows[name]["difference"] = difference(result, results[base])
        if result.tasks:
            accuracy, error = mean_accuracy(result.tasks)
            rows[name]["mean_accuracy"] = {"accuracy": accuracy, "accuracy_se": error}
    return rows


def evaluate_models(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Measure every model on the held-out text of every domain and of the target, all on the same windows.

    Returns:
        What evaluation.json holds: sequence_length; base: `base_of`; models, by name: path, kind, experts and
        `compared`; monolith: its row among the gates (`table_row`), or None.
    """
    data = PreparedData.load(recipe.prepared_folder)
    training = recipe.training or recipe.expert_settings.training
    length = training.sequence_length
    if recipe.has_experts:
        length = min(length, recipe.expert_settings.training.sequence_length)
    device = choose_runtime(training, parameters=0).device
    heldout, models = HeldOut(recipe, data, recipe.evaluation, length, device), models_of(recipe)
    found: dict[str, Any] = {}
    results: dict[str, SuiteResult] = {}
    with ProgressBar("evaluate", total=len(models), unit="models", enabled=progress) as counter:
        for name, place in models.items():
            opened = open_model(place.path, device=str(device), encoder_decoder=True, **place.settings)
            found[name] = {"path": str(place.path), "kind": opened.kind, "experts": list(opened.experts)}
            results[name] = heldout.score(opened.model, opened.tokenizer)
            counter.advance()
    rows = compared(results, {name: place.role for name, place in models.items()}, base_of(recipe) or BASE)
    value = {
        "sequence_length": length,
        "base": base_of(recipe),
        "models": {name: {**facts, **rows[name]} for name, facts in found.items()},
        MONOLITH: _monolith_row(recipe),
    }
    write_object(recipe.run / EVALUATION, value)
    return value


def read_evaluation(recipe: Recipe) -> dict[str, Any]:
    """What `evaluate_models` found; errors as `read_measured`."""
    return read_measured(recipe.run / EVALUATION, "evaluate")


def _monolith_row(recipe: Recipe) -> dict[str, Any] | None:
    """The monolith on the sequences no gate was fitted on."""
    folder = recipe.baselines_folder / MONOLITH
    if not recipe.has_gate or not (folder / "result.json").exists():
        return None
    problem = held_out_problem(open_scores(recipe, causal=True), recipe.gating_settings)
    device = choose_runtime(recipe.expert_settings.training, parameters=0).device
    return {**model_row(load_trained(folder / "model").to(device), problem), "role": "baseline"}

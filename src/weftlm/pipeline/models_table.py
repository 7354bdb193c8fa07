"""Every model of a project on the same held-out text, and the gate's baseline on the sequences no gate was fitted on.

<run>/evaluation.json       what was found
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from weftlm.errors import DataError
from weftlm.evaluation.result import MeanResult, finite_or_none, mean_result, paired_difference
from weftlm.evaluation.suite import SuiteResult, evaluate_suite
from weftlm.evaluation.tasks import read_tasks, score_tasks
from weftlm.experts.lora import load_trained
from weftlm.files import read_object, write_object
from weftlm.gating.problem import measure
from weftlm.pipeline.any_model import open_model
from weftlm.pipeline.baselines import baseline_folders
from weftlm.pipeline.gating import open_scores
from weftlm.pipeline.heldout import heldout_sets
from weftlm.pipeline.names import EVALUATION
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import MONOLITH, Recipe
from weftlm.pipeline.students import held_out_problem, log_likelihoods, read_students, table_row
from weftlm.progress import progress as show_progress
from weftlm.reporting.score_table import Role
from weftlm.training.runtime import choose_runtime

log = logging.getLogger(__name__)

BASE = "base"


def base_of(recipe: Recipe) -> str | None:
    """What a table calls the model that the experts are over; None where a project makes none."""
    if not recipe.makes_experts:
        return None
    baseline = recipe.expert_settings.baseline
    return BASE if baseline is None else f"baseline: {baseline}"


@dataclass(frozen=True)
class Place:
    """A model that a table compares.

    Attributes:
        path: folder or hub name.
        role: what it is in the tables of the report.
        settings: revision and type of a model that was there before.
    """

    path: Path | str
    role: Role
    settings: Mapping[str, Any] = field(default_factory=dict)


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
        What evaluation.json holds: sequence_length; base: `base_of`; models, by name: path, kind, role, experts, sets
        and generic as in a run's result.json, tasks where the recipe has any, and difference: to the base, paired by
        window, by set and in the mean over sets (null where the windows differ); monolith: its row among the gates
        (`table_row`), or None.
    Raises:
        WeftError: a model cannot be opened or measured.
    """
    data = PreparedData.load(recipe.prepared_folder)
    config = recipe.evaluation
    training = recipe.training or recipe.expert_settings.training
    lengths = [training.sequence_length]
    if recipe.has_experts:
        lengths.append(recipe.expert_settings.training.sequence_length)
    length, device = min(lengths), choose_runtime(training, parameters=0).device
    domains, target = heldout_sets(data, None if not recipe.has_experts else recipe.expert_settings.examples)
    questions = read_tasks(config.tasks)
    models = models_of(recipe)
    found: dict[str, Any] = {}
    results: dict[str, SuiteResult] = {}
    with show_progress("evaluate", total=len(models), unit="models", enabled=progress) as counter:
        for name, place in models.items():
            opened = open_model(place.path, device=str(device), encoder_decoder=True, **place.settings)
            result = evaluate_suite(
                opened.model,
                domains,
                target,
                sequence_length=length,
                config=config,
                device=device,
            )
            results[name] = result
            tasks = score_tasks(
                opened.model,
                opened.tokenizer,
                questions,
                batch_size=config.batch_size,
                max_length=length,
                device=device,
            )
            found[name] = {
                "path": str(place.path), "kind": opened.kind, "role": place.role, "experts": list(opened.experts),
                **replace(result, tasks=tasks).to_json(),
            }  # fmt: skip
            counter.advance()
    base = base_of(recipe) or BASE
    for name, result in results.items():
        if name != base and base in results:
            found[name]["difference"] = _difference(result, results[base])
    value = {
        "sequence_length": length, "base": base_of(recipe), "models": found, MONOLITH: _monolith_row(recipe),
    }  # fmt: skip
    write_object(recipe.run / EVALUATION, value)
    return value


def _difference(result: SuiteResult, base: SuiteResult) -> dict[str, Any] | None:
    """A model minus the base, window by window; None where the two did not read the same windows."""
    try:
        sets = {name: paired_difference(one.windows, base.sets[name].windows) for name, one in result.sets.items()}
    except DataError as error:
        log.info("no paired difference to the base: %s", error)
        return None
    return {"mean": _numbers(mean_result(sets)), "sets": {name: _numbers(one) for name, one in sets.items()}}


def _numbers(one: MeanResult) -> dict[str, float | None]:
    return {
        "bits_per_byte": finite_or_none(one.bits_per_byte),
        "bits_per_byte_se": finite_or_none(one.bits_per_byte_se),
    }


def read_evaluation(recipe: Recipe) -> dict[str, Any]:
    """What `evaluate_models` found.

    Raises:
        DataError: it has not been carried out, or the file is torn.
    """
    path = recipe.run / EVALUATION
    cure = "make it again: weftlm run --from evaluate"
    found = read_object(path, cure)
    if found is None:
        raise DataError(f"{path} is not there; {cure}")
    if not all("role" in model for model in found["models"].values()):
        raise DataError(f"{path} was written by an earlier version and lacks the roles of its models; {cure}")
    return found


@torch.inference_mode()
def _monolith_row(recipe: Recipe) -> dict[str, Any] | None:
    """The baseline on the sequences no gate was fitted on."""
    folder = recipe.baselines_folder / MONOLITH
    if not recipe.has_experts or recipe.gating is None or not (folder / "result.json").exists():
        return None
    scores = open_scores(recipe, causal=True)
    problem = held_out_problem(scores, recipe.gating_settings)
    device = choose_runtime(recipe.expert_settings.training, parameters=0).device
    model = load_trained(folder / "model").to(device)
    logs = [log_likelihoods(model, one) for one in scores.split.held_domains.values()]
    return {**table_row(measure(logs, problem), problem), "role": "baseline"}

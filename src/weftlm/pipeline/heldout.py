"""Models measured on the same held-out text and tasks, window by window, so that differences are paired.

<run>/evaluation.json       every model of a project, and the monolith on the sequences no gate was fitted on
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from weftlm.corpora.tokens import Tokenizer
from weftlm.errors import DataError
from weftlm.evaluation.choices import mean_accuracy, read_tasks, score_tasks
from weftlm.evaluation.config import EvaluationConfig
from weftlm.evaluation.result import mean_result
from weftlm.evaluation.suite import SuiteResult, evaluate_suite, suite_difference
from weftlm.experts.examples import training_source
from weftlm.files import read_object, write_object
from weftlm.pipeline.any_model import open_model
from weftlm.pipeline.gating import model_row, student_folders
from weftlm.pipeline.names import EVALUATION, MONOLITH, RESULT
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.scoring import open_scores
from weftlm.progress import ProgressBar
from weftlm.reporting.score_table import Role
from weftlm.training.runtime import choose_runtime

log = logging.getLogger(__name__)

BASE = "base"


class HeldOut:
    """What models are compared on: the held-out sets of prepared data, and tasks.

    Args:
        recipe: Recipe, whose experts say how documents with prompts are read.
        data: Prepared data.
        config: Extent of the evaluation.
        length: Tokens of a window.
        device: Device that the models are on.
    Attributes:
        domains: Held-out text by domain.
        target: Held-out text of the target; None without a target.
        questions: Questions of the tasks.
    Raises:
        ConfigError: nothing is held out, or examples are asked of plain text.
    """

    def __init__(
        self, recipe: Recipe, data: PreparedData, config: EvaluationConfig, length: int, device: torch.device
    ) -> None:
        examples = recipe.expert_settings.examples if recipe.has_experts else None
        self.domains = {name: training_source(store, name, examples) for name, store in data.heldout().items()}
        held = data.target_heldout
        self.target = None if held is None else training_source(held, "target", examples)
        self.questions = read_tasks(config.tasks)
        self.config, self.length, self.device = config, length, device

    def score(self, model: Any, tokenizer: Tokenizer) -> SuiteResult:
        """Evaluate a model on every set and task."""
        result = evaluate_suite(
            model, self.domains, self.target,
            sequence_length=self.length, config=self.config, device=self.device,
        )  # fmt: skip
        tasks = score_tasks(
            model, tokenizer, self.questions,
            batch_size=self.config.batch_size, max_length=self.length, device=self.device,
        )  # fmt: skip
        return replace(result, tasks=tasks)


def compared(
    results: Mapping[str, SuiteResult], roles: Mapping[str, Role], base: str | None
) -> dict[str, dict[str, Any]]:
    """Rows of a table of models on the same held-out text.

    Args:
        results, roles: Result and role of each model by its name.
        base: Name of the model that the others are compared with; None where there is none.
    Returns:
        By model: role, `SuiteResult.to_json`, mean_accuracy where there are tasks, and difference: the model minus the
        base in bits per byte, window by window, by set under `sets`, in the `mean` over all sets and `generic` over the
        domains, each with its standard error; None where the two did not read the same windows.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        rows[name] = {"role": roles[name], **result.to_json()}
        if base is not None and base in results and name != base:
            rows[name]["difference"] = _difference(result, results[base])
        if result.tasks:
            accuracy, error = mean_accuracy(result.tasks)
            rows[name]["mean_accuracy"] = {"accuracy": accuracy, "accuracy_se": error}
    return rows


def _difference(result: SuiteResult, base: SuiteResult) -> dict[str, Any] | None:
    try:
        sets = suite_difference(result, base)
    except DataError as error:
        log.info("no paired difference to the base: %s", error)
        return None
    means = {"generic": sets.pop("generic")} if result.domains else {}
    means["mean"] = mean_result(sets)
    lines = {name: one.to_json() for name, one in sets.items()}
    return {**{name: one.to_json() for name, one in means.items()}, "sets": lines}


def read_measured(path: Path, stage: str) -> dict[str, Any]:
    """What a stage has measured.

    Raises:
        DataError: The stage has not been carried out, or the file is torn or of an earlier version.
    """
    cure = f"make it again: weftlm run --from {stage}"
    found = read_object(path, cure)
    if found is None:
        raise DataError(f"{path} is not there; {cure}")
    check_roles(found.get("rows", found.get("models")), path, cure)
    return found


def check_roles(rows: Any, path: Path, cure: str) -> None:
    """Refuse rows without a role, which earlier versions wrote.

    Raises:
        DataError: There are such.
    """
    if not isinstance(rows, dict) or not all(isinstance(row, dict) and "role" in row for row in rows.values()):
        raise DataError(f"{path} was written by another version of weftlm (rows without a role); {cure}")


# -- the models of a project --------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A model that a table compares: folder or hub name, role in the table, and how to open it."""

    path: Path | str
    role: Role
    settings: Mapping[str, Any] = {}


def baseline_folders(recipe: Recipe) -> dict[str, Path]:
    """Folders of the finished baselines, by policy, the monolith last."""
    names = [policy.policy for policy in recipe.compare.mixtures] + ([MONOLITH] if recipe.trains_monolith else [])
    folders = {name: recipe.baselines_folder / name for name in names}
    return {name: folder for name, folder in folders.items() if (folder / RESULT).exists()}


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
    if recipe.mixture is not None and (recipe.run / RESULT).exists():
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
    for folder in student_folders(recipe) if recipe.has_experts else ():
        found[f"gate: {folder.name}"] = Place(folder, "student")
    return found


def evaluate_models(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Measure every model on the held-out text of every domain and of the target, all on the same windows.

    Returns:
        What evaluation.json holds: sequence_length; base: `base_of`; models, by name: path, kind, experts and
        `compared`; monolith: its row among the gates (`table_row`), or None.
    """
    data, training = PreparedData.load(recipe.prepared_folder), recipe.training or recipe.expert_settings.training
    length, device = training.sequence_length, choose_runtime(training, parameters=0).device
    if recipe.has_experts:
        length = min(length, recipe.expert_settings.training.sequence_length)
    heldout, models = HeldOut(recipe, data, recipe.evaluation, length, device), models_of(recipe)
    found: dict[str, Any] = {}
    results, monolith = dict[str, SuiteResult](), None
    with ProgressBar("evaluate", total=len(models), unit="models", enabled=progress) as counter:
        for name, place in models.items():
            opened = open_model(place.path, device=str(device), encoder_decoder=True, **place.settings)
            found[name] = {"path": str(place.path), "kind": opened.kind, "experts": list(opened.experts)}
            results[name] = heldout.score(opened.model, opened.tokenizer)
            if name == f"baseline: {MONOLITH}" and recipe.has_gate:
                problem = open_scores(recipe, causal=True).held_out(recipe)
                monolith = {**model_row(opened.model, problem), "role": "baseline"}
            counter.advance()
    base = base_of(recipe)
    rows = compared(results, {name: place.role for name, place in models.items()}, base or BASE)
    facts = {name: {**own, **rows[name]} for name, own in found.items()}
    value = {"sequence_length": length, "base": base, "models": facts, MONOLITH: monolith}
    write_object(recipe.run / EVALUATION, value)
    return value


def read_evaluation(recipe: Recipe) -> dict[str, Any]:
    """What `evaluate_models` found; errors as `read_measured`."""
    return read_measured(recipe.run / EVALUATION, "evaluate")

"""Models measured on the same held-out text and tasks, window by window, so that differences are paired."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from weftlm.corpora.tokens import Tokenizer
from weftlm.errors import DataError
from weftlm.evaluation.choices import read_tasks, score_tasks
from weftlm.evaluation.config import EvaluationConfig
from weftlm.evaluation.result import mean_result
from weftlm.evaluation.suite import SuiteResult, evaluate_suite, suite_difference
from weftlm.experts.examples import training_source
from weftlm.files import read_object
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe

log = logging.getLogger(__name__)


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


def difference(result: SuiteResult, base: SuiteResult) -> dict[str, Any] | None:
    """A model minus the base, window by window; None where the two did not read the same windows.

    Returns:
        `sets` by name, `mean` over all sets, and `generic` over the domains where there are any, each with its
        standard error.
    """
    try:
        sets = suite_difference(result, base)
    except DataError as error:
        log.info("no paired difference to the base: %s", error)
        return None
    means = {"generic": sets.pop("generic")} if result.domains else {}
    means["mean"] = mean_result(sets)
    return {
        **{name: one.to_json() for name, one in means.items()},
        "sets": {name: one.to_json() for name, one in sets.items()},
    }


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

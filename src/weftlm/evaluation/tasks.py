"""The tasks of a recipe: sets of questions with listed answers, ranked by every model that is compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from weftlm.corpora.formats import split_suffix
from weftlm.corpora.tokens import Tokenizer
from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.evaluation.choices import ChoiceQuestion, ChoiceResult, read_choices, score_choices
from weftlm.evaluation.config import ChoiceTask
from weftlm.evaluation.task_files import files_of
from weftlm.models.language_model import LanguageModel

Questions = Mapping[str, tuple[ChoiceTask, Sequence[ChoiceQuestion]]]
"""The questions of each task, by its name."""


def read_tasks(tasks: Sequence[ChoiceTask]) -> Questions:
    """The questions of every task, in order; of a glob in order of path.

    Raises:
        ConfigError: two tasks would have one name.
        DataError: a path matches no file, or as `read_choices`.
    """
    found: dict[str, tuple[ChoiceTask, Sequence[ChoiceQuestion]]] = {}
    for task in tasks:
        single, paths = files_of(task)
        for path in paths:
            own = path.name.removesuffix("".join(split_suffix(path)))
            name = own if task.name is None else task.name if single else f"{task.name}/{own}"
            if name in found:
                raise ConfigError(f"evaluation.tasks: two tasks would be called {name!r}; give each a name")
            questions = read_choices(path)
            count, most = len(questions), task.max_questions or len(questions)
            if count > most:
                questions = [questions[(2 * place + 1) * count // (2 * most)] for place in range(most)]
            found[name] = (task, questions)
    return found


def score_tasks(
    model: nn.Module | LanguageModel,
    tokenizer: Tokenizer,
    questions: Questions,
    *,
    batch_size: int,
    max_length: int,
    device: torch.device | str = "cpu",
) -> dict[str, ChoiceResult]:
    """`score_choices` of each task.

    Raises:
        ConfigError, DataError, NumericsError: as `score_choices`, naming the task.
    """
    found = {}
    for name, (task, asked) in questions.items():
        try:
            found[name] = score_choices(
                model, tokenizer, asked,
                batch_size=batch_size, max_length=max_length, device=device, separator=task.separator,
            )  # fmt: skip
        except (ConfigError, DataError, NumericsError) as error:
            raise type(error)(f"task {name!r}: {error}") from error
    return found


def mean_accuracy(results: Mapping[str, ChoiceResult]) -> tuple[float, float]:
    """The plain mean of some tasks' accuracies and its standard error, tasks taken as independent of each other."""
    mean = math.fsum(each.accuracy for each in results.values()) / len(results)
    return mean, math.hypot(*(each.accuracy_se for each in results.values())) / len(results)

"""The tasks of a recipe: sets of questions with listed answers, ranked by every model that is compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import nn

from weftlm.config import Section
from weftlm.corpora.formats import split_suffix
from weftlm.corpora.paths import corpus_files
from weftlm.corpora.store_files import file_digest
from weftlm.corpora.tokens import Tokenizer
from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.evaluation.choices import ChoiceQuestion, ChoiceResult, read_choices, score_choices
from weftlm.models.language_model import LanguageModel


class ChoiceTask(Section):
    """Questions with listed answers: JSON Lines of `prompt`, `choices` and `answer` (an index or the right text).

    Attributes:
        path: a file, or a glob (`**` allowed) whose every file is a task of its own.
        name: what it is called; of a glob, what its tasks' names begin with, before a slash and the file's own name.
            Absent: the file's name without suffixes.
        separator: put between prompt and choice, and scored with the choice.
        max_questions: ask at most so many of each file, evenly spaced; absent: all.
    """

    path: str = Field(min_length=1)
    name: str | None = Field(default=None, min_length=1)
    separator: str = ""
    max_questions: int | None = Field(default=None, ge=1)


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
        single, paths = _files(task)
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


def task_files(tasks: Sequence[ChoiceTask]) -> dict[str, str]:
    """BLAKE2b-256 of every file that holds the questions of some tasks, by path.

    Raises:
        DataError: a path matches no file, or one cannot be read.
    """
    found = {}
    for path in (path for task in tasks for path in _files(task)[1]):
        try:
            found[str(path)] = file_digest(path)
        except OSError as error:
            raise DataError(f"evaluation.tasks: {path} cannot be read: {error}") from error
    return found


def _files(task: ChoiceTask) -> tuple[bool, list[Path]]:
    """Whether a task is one file, and the files it names."""
    try:
        paths = corpus_files(task.path, lambda entry: None)[0]
    except DataError as error:
        raise DataError(f"evaluation.tasks: {error}") from None
    return paths == [Path(task.path).expanduser()], paths


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
    """The plain mean of some tasks' accuracies and its standard error, tasks taken as independent of each other.

    Raises:
        DataError: there is no task.
    """
    if not results:
        raise DataError("a mean over tasks needs at least one task")
    values = list(results.values())
    mean = math.fsum(each.accuracy for each in values) / len(values)
    return mean, math.hypot(*(each.accuracy_se for each in values)) / len(values)

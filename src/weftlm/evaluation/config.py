"""The `evaluation` section of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from weftlm.config import Section
from weftlm.corpora.paths import corpus_files
from weftlm.errors import DataError, reason
from weftlm.files import describe


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

    def files(self) -> list[Path]:
        """The files it names.

        Raises:
            DataError: none matches, or one cannot be read.
        """
        try:
            return corpus_files(self.path, lambda entry: None)[0]
        except DataError as error:
            raise DataError(f"evaluation.tasks: {error}") from None


class EvaluationConfig(Section):
    """How often and how much to evaluate.

    Attributes:
        every_steps: optimizer steps between two evaluations; None evaluates at the end alone.
        max_tokens_per_set: tokens scored per set, in evenly spaced windows; None scores everything.
        batch_size: windows per forward pass.
        tasks: questions with listed answers, ranked by the base and every routed or single expert that are compared,
            and by every model in the table of `weftlm run`.
    """

    every_steps: int | None = Field(default=None, ge=1)
    max_tokens_per_set: int | None = Field(default=65_536, ge=1)
    batch_size: int = Field(default=16, ge=1)
    tasks: tuple[ChoiceTask, ...] = ()


def task_files(tasks: Sequence[ChoiceTask]) -> dict[str, str]:
    """BLAKE2b-128 of every file that holds the questions of some tasks, by path.

    Raises:
        DataError: a path matches no file, or one cannot be read.
    """
    try:
        return {str(path): describe(path)["blake2b"] for task in tasks for path in task.files()}
    except OSError as error:
        raise DataError(f"evaluation.tasks: {error.filename} cannot be read: {reason(error)}") from error

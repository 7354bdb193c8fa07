"""Files of the tasks an evaluation asks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weftlm.corpora.paths import corpus_files
from weftlm.errors import DataError, reason
from weftlm.evaluation.config import ChoiceTask
from weftlm.files import describe


def task_files(tasks: Sequence[ChoiceTask]) -> dict[str, str]:
    """BLAKE2b-128 of every file that holds the questions of some tasks, by path.

    Raises:
        DataError: a path matches no file, or one cannot be read.
    """
    found = {}
    for path in (path for task in tasks for path in files_of(task)[1]):
        try:
            found[str(path)] = describe(path)["blake2b"]
        except OSError as error:
            raise DataError(f"evaluation.tasks: {path} cannot be read: {reason(error)}") from error
    return found


def files_of(task: ChoiceTask) -> tuple[bool, list[Path]]:
    """Whether a task is one file, and the files it names."""
    try:
        paths = corpus_files(task.path, lambda entry: None)[0]
    except DataError as error:
        raise DataError(f"evaluation.tasks: {error}") from None
    return paths == [Path(task.path).expanduser()], paths

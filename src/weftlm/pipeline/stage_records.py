"""What is known of each stage of a run folder: when it ran, of what, and what it left.

<run>/stages/STAGE.json     written when a stage begins, and again when it ends or fails
<run>/.lock                 held by whatever writes into the run folder
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from weftlm.artifact import is_locked, locked
from weftlm.config import Section, validate
from weftlm.errors import CheckpointError, ConfigError, DataError, reason
from weftlm.files import describe, read_object, sweep, write_object

LOCK = ".lock"


class Record(Section):
    """One stage.

    Attributes:
        stage: its name.
        state: begun, done or failed; due: what is there was to be discarded and made anew, and none of that has begun.
        settings: of the recipe, that decide its result.
        needs: digest of what each stage it reads had left, by that stage's name.
        began: time, UTC.
        ended: time, UTC; None while it runs.
        seconds: it took, interrupted attempts left out.
        outputs: BLAKE2b of each file it left, by path.
        message: of the failure.
        replace: whether it was to discard what was there of other settings, which going on with it then does too.
    """

    stage: str
    state: Literal["due", "begun", "done", "failed"]
    settings: Any
    needs: dict[str, str]
    began: str
    ended: str | None = None
    seconds: float = 0.0
    outputs: dict[str, str] = Field(default_factory=dict)
    message: str = ""
    replace: bool = False

    @property
    def digest(self) -> str:
        """Of all it left."""
        return hashlib.blake2b(json.dumps(self.outputs, sort_keys=True).encode(), digest_size=16).hexdigest()


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_record(folder: Path, stage: str) -> Record | None:
    """A stage's record; None where it never began.

    Raises:
        DataError: the record is torn.
    """
    path = folder / f"{stage}.json"
    cure = "delete it, and the stage is looked at again"
    value = read_object(path, cure)
    try:
        return None if value is None else validate(Record, value, str(path))
    except ConfigError as error:
        raise DataError(f"{path} cannot be read ({error}); {cure}") from error


def write_record(folder: Path, record: Record) -> None:
    """Keep a record."""
    folder.mkdir(parents=True, exist_ok=True)
    write_object(folder / f"{record.stage}.json", record.model_dump(mode="json"))


def digests(paths: Sequence[Path]) -> dict[str, str]:
    """BLAKE2b of each file.

    Raises:
        DataError: one is not there.
    """
    found = {}
    for path in paths:
        try:
            found[str(path)] = describe(path)["blake2b"]
        except OSError as error:
            raise DataError(f"{path} should have been written and cannot be read: {reason(error)}") from error
    return found


def seconds_of(folder: Path, stage: str) -> float | None:
    """How long a finished stage took; None where it is not finished."""
    record = read_record(folder, stage)
    return record.seconds if record is not None and record.state == "done" else None


@contextmanager
def alone(run: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a run folder against other processes that write into it, and sweep the folders in it.

    Args:
        run: the folder.
        shared: beside others that hold it shared; makers of experts do, whose experts have locks of their own.
    Raises:
        CheckpointError: one is at work there; the message names it.
    """

    def refusal(who: str) -> CheckpointError:
        return CheckpointError(
            f"{who} is at work in {run}; wait for it (weftlm status {run}), or choose another run folder"
        )

    with locked(run / LOCK, refusal, shared=shared, again=True):
        for folder in run.iterdir():
            sweep(folder)
        yield


def at_work(run: Path) -> bool:
    """Whether another process is at work in a run folder."""
    return is_locked(run / LOCK)

"""What is known of each stage of a run folder: when it ran, of what, and what it left.

<run>/stages/STAGE.json     written when a stage begins, and again when it ends or fails
<run>/stages/.lock          held while a pipeline works in the folder
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from weftlm.config import Section, validate
from weftlm.errors import CheckpointError, ConfigError, DataError
from weftlm.files import write_whole

LOCK = ".lock"


class Record(Section):
    """One stage.

    Attributes:
        stage: its name.
        state: begun, done or failed.
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
    state: Literal["begun", "done", "failed"]
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
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return validate(Record, value, str(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ConfigError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it, and the stage is looked at anew") from error


def write_record(folder: Path, record: Record) -> None:
    """Keep a record."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{record.stage}.json", json.dumps(record.model_dump(mode="json"), indent=1) + "\n")


def digests(paths: Sequence[Path]) -> dict[str, str]:
    """BLAKE2b of each file.

    Raises:
        DataError: one is not there.
    """
    found = {}
    for path in paths:
        try:
            with path.open("rb") as file:
                found[str(path)] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except OSError as error:
            raise DataError(f"{path} should have been written and cannot be read: {error}") from error
    return found


def seconds_of(folder: Path, stage: str) -> float | None:
    """How long a finished stage took; None where it is not finished."""
    record = read_record(folder, stage)
    return record.seconds if record is not None and record.state == "done" else None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run folder against a second pipeline.

    Raises:
        CheckpointError: one is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"another weftlm run is at work in {folder.parent}; wait for it (weftlm status), or choose another run "
                "folder"
            ) from None
        yield


def at_work(folder: Path) -> bool:
    """Whether a pipeline is at work in a run folder."""
    path = folder / LOCK
    if not path.exists():
        return False
    with path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.flock(file, fcntl.LOCK_UN)
    return False

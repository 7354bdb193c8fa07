"""One process at a time in a run folder: <run>/.lock is held by whatever writes there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weftlm.artifact import locked
from weftlm.errors import CheckpointError
from weftlm.files import sweep

LOCK = ".lock"


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """Hold a run folder against other processes that write into it, and sweep it with all folders in it.

    Args:
        run: The folder.
    Raises:
        CheckpointError: Another process works there; the message names it.
    """

    def refusal(who: str) -> CheckpointError:
        return CheckpointError(
            f"{who} is at work in {run}; wait for it (weftlm status {run}), or choose another run folder"
        )

    with locked(run / LOCK, refusal, again=True):
        for folder, _, _ in os.walk(run):
            sweep(Path(folder))
        yield

"""metrics.jsonl: one JSON object per line, rewound on resume to the step of the checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from weftlm.errors import CheckpointError, DataError, reason
from weftlm.files import describe, parse_json, write_whole

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends to metrics.jsonl and passes the numbers of each line on to trackers.

    Args:
        path: the file; None writes to the trackers alone.
        resume_step: lines of later steps, and a torn last line, are dropped: they are about to be written again.
        trackers: get the numbers of every line, under `kind/name`.
    """

    def __init__(self, path: Path | None, *, resume_step: int = 0, trackers: tuple[GeneralTracker, ...] = ()) -> None:
        self._path, self._trackers = path, trackers
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _rewind(path, resume_step)

    def write(self, kind: str, step: int, tokens: int, **values: Any) -> None:
        """Append one line; numbers that are not finite become null."""
        line = {"kind": kind, "step": step, "tokens": tokens, **_finite(values)}
        if self._path is not None:
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise CheckpointError(
                    f"metrics.jsonl cannot be written: {reason(error)}; free some space, then the same command goes on "
                    f"from the last checkpoint"
                ) from error
        for tracker in self._trackers:
            tracker.log(dict(flatten(line)), step=step)

    def flush(self) -> dict[str, Any] | None:
        """Force the lines to disk, so that a checkpoint never knows more than its log; gives their size and digest."""
        if self._path is None:
            return None
        with self._path.open("ab") as file:
            os.fsync(file.fileno())
        return describe(self._path)

    def close(self) -> None:
        """Finish the trackers."""
        for tracker in self._trackers:
            tracker.finish()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file; a torn last line (a run killed while writing) is left out.

    Raises:
        DataError: a line is no JSON object with a kind and a step.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                return
            try:
                line = parse_json(text)
                sound = isinstance(line["kind"], str) and isinstance(line["step"], int)
            except (ValueError, LookupError, TypeError, RecursionError):
                sound = False
            if not sound:
                raise DataError(
                    f"{path}, line {number}, is not what was written; restore the file from a copy, or delete that "
                    "line, whose numbers are then missing from the report"
                )
            yield line


def check_metrics(path: Path, stated: Mapping[str, Any] | None) -> None:
    """Compare the beginning of a metrics file with what `MetricsLog.flush` gave; one that is not there passes.

    Raises:
        CheckpointError: it was altered or cut short since.
    """
    if stated is None or not path.is_file():
        return
    with path.open("rb") as file:
        found = hashlib.blake2b(file.read(stated["bytes"]), digest_size=16).hexdigest()
    if found != stated["blake2b"]:
        raise CheckpointError(
            f"{path} was altered since the checkpoint was written; restore it from a copy, or delete it and run the "
            "same command again: the curves then begin at the checkpoint"
        )


def _rewind(path: Path, resume_step: int) -> None:
    kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if resume_step > 0 else []
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def open_tracker(kind: str, folder: Path, recipe: Mapping[str, Any]) -> GeneralTracker:
    """A tracker that writes TensorBoard's format or a Weights & Biases run.

    Args:
        kind: `tensorboard` or `wandb`; needs the package of that name, and wandb its own login.
        folder: the run folder, in which the tracker keeps its files.
        recipe: the resolved recipe, shown as the run's configuration.
    """
    if kind == "tensorboard":
        tracker: GeneralTracker = TensorBoardTracker(kind, folder)
    else:
        tracker = WandBTracker("weftlm", name=folder.name, dir=str(folder), config=dict(recipe))
    tracker.start()
    return tracker


def flatten(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a metric line as (kind/path, value)."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from walk(f"{prefix}/{key}", item)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix, float(value)

    for key, item in line.items():
        if key not in ("kind", "step"):
            yield from walk(f"{line['kind']}/{key}", item)

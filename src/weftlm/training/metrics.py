"""metrics.jsonl: one JSON object per line, rewound on resume to the step a checkpoint stands for."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from accelerate.tracking import TensorBoardTracker, WandBTracker

from weftlm.errors import CheckpointError, DataError, reason
from weftlm.files import describe, parse_json, write_whole

METRICS = "metrics.jsonl"


class MetricsSink(Protocol):
    """Where metric lines also go: TensorBoard, Weights & Biases."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Take one line of metrics.jsonl."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


class MetricsLog:
    """Appends to metrics.jsonl and passes each line on to further sinks.

    Args:
        path: the file; None writes to the sinks alone.
        resume_step: lines of later steps, and a torn last line, are dropped: they are about to be written again.
        sinks: further receivers of every line.
        enabled: False writes nothing (every rank but the first).
    """

    def __init__(
        self, path: Path | None, *, resume_step: int = 0, sinks: tuple[MetricsSink, ...] = (), enabled: bool = True
    ) -> None:
        self._sinks = sinks if enabled else ()
        self._file = None
        if enabled and path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _rewind(path, resume_step)
            self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, tokens: int, **values: Any) -> None:
        """Append one line; numbers that are not finite become null."""
        line = {"kind": kind, "step": step, "tokens": tokens, **_finite(values)}
        if self._file is not None:
            try:
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()
            except OSError as error:
                raise CheckpointError(
                    f"metrics.jsonl cannot be written: {reason(error)}; free some space, then the same command goes on "
                    f"from the last checkpoint"
                ) from error
        for sink in self._sinks:
            sink.write(line)

    def flush(self) -> dict[str, Any] | None:
        """Force the lines to disk, so that a checkpoint never knows more than its log; gives their size and digest."""
        if self._file is None:
            return None
        os.fsync(self._file.fileno())
        return describe(Path(self._file.name))

    def close(self) -> None:
        """Close the file and the sinks."""
        if self._file is not None:
            self._file.close()
        for sink in self._sinks:
            sink.close()


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
    if not path.exists():
        return
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


class TrackerSink:
    """The numbers of every metric line, under `kind/name`, in TensorBoard's format or a Weights & Biases run.

    Args:
        kind: `tensorboard` or `wandb`; needs the package of that name, and wandb its own login.
        folder: the run folder, in which the tracker keeps its files.
        recipe: the resolved recipe, shown as the run's configuration.
    """

    def __init__(self, kind: str, folder: Path, recipe: Mapping[str, Any]) -> None:
        if kind == "tensorboard":
            self._tracker: Any = TensorBoardTracker(kind, folder)
        else:
            self._tracker = WandBTracker("weftlm", name=folder.name, dir=str(folder), config=dict(recipe))
        self._tracker.start()

    def write(self, line: Mapping[str, Any]) -> None:
        """See `MetricsSink.write`."""
        self._tracker.log(dict(flatten(line)), step=line["step"])

    def close(self) -> None:
        """See `MetricsSink.close`."""
        self._tracker.finish()


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

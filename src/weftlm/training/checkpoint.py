"""Atomic, checksummed checkpoints: a crash at any moment leaves the newest complete one usable.

A checkpoint is a sealed folder `step-00000200/` (`weftlm.files`) with `tensors.safetensors` and `state.json`, flushed
to disk and published by one rename. A torn or altered one is recognised and the one before it used.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weftlm.errors import CheckpointError, DataError, reason
from weftlm.files import SEAL, check_sealed, parse_json, remove, sweep, whole_folder

log = logging.getLogger(__name__)

TENSORS, STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to continue as if it had never stopped.

    Attributes:
        step: optimizer steps taken.
        tensors: weights (`model.*`), optimizer moments (`optimizer.*`) and the best weights so far (`best.*`), if kept.
        state: JSON-able rest: sampler, policy, counters.
    """

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write a checkpoint and drop all but the newest `keep`.

    Raises:
        CheckpointError: the disk is full or not writable; nothing half-written is left and older checkpoints stay.
    """
    final = checkpoint_path(folder, checkpoint.step)
    tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_folder(final, "checkpoint", replace=True, sync=True) as making:
            save_file(tensors, making / TENSORS)
            (making / STATE).write_text(json.dumps({"step": checkpoint.step, **checkpoint.state}), encoding="utf-8")
    except (OSError, SafetensorError, CheckpointError) as error:
        raise CheckpointError(
            f"checkpoint of step {checkpoint.step} could not be written to {folder}: {reason(error)}; "
            f"older checkpoints are untouched and the same command continues from the newest"
        ) from error
    for old in _steps(folder)[:-keep]:
        remove(checkpoint_path(folder, old))
    return final


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; torn or altered ones are passed over with a warning.

    Returns:
        None when the folder holds no checkpoint at all.
    Raises:
        CheckpointError: there are checkpoints and none of them is whole.
    """
    sweep(folder)
    steps = _steps(folder)
    problems = []
    for step in reversed(steps):
        try:
            return load_checkpoint(checkpoint_path(folder, step))
        except CheckpointError as error:
            problems.append(str(error))
            log.warning("%s; trying the checkpoint before it", error)
    if problems:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {folder} is whole: {problems[0]}; "
            f"remove the folder to start the run again"
        )
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Load and verify one checkpoint folder.

    Raises:
        CheckpointError: a file is missing, was altered since it was written, or cannot be parsed.
    """
    try:
        if not (path / SEAL).is_file():
            raise DataError(f"{SEAL} is missing")
        check_sealed(path, "use another checkpoint")
        state = parse_json((path / STATE).read_text(encoding="utf-8"))
        return Checkpoint(step=int(state.pop("step")), tensors=load_file(path / TENSORS), state=state)
    except (DataError, OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is torn: {reason(error)}") from error


def _steps(folder: Path) -> list[int]:
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted(int(name) for name in names if name.isdigit())

"""Atomic, checksummed checkpoints: a crash at any moment leaves the newest complete one usable.

A checkpoint is a folder `step-00000200/` with `tensors.safetensors`, `state.json` and `manifest.json`. It is written
under a temporary name, every file and folder is flushed to disk, and one rename publishes it. The manifest holds each
file's length and BLAKE2b digest, so a torn or altered checkpoint is recognised and the one before it used.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weftlm.errors import CheckpointError, reason
from weftlm.files import describe, hidden, is_full, no_room, parse_json, remove, sweep

log = logging.getLogger(__name__)

FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to continue as if it had never stopped.

    Attributes:
        step: optimizer steps taken.
        tensors: weights (`model.*`), optimizer moments (`optimizer.*`) and random-generator states (`rng.*`).
        state: JSON-able rest: sampler, policy, counters.
    """

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write a checkpoint and drop all but the newest `keep`.

    Raises:
        CheckpointError: the disk is full or not writable; nothing half-written is left and older checkpoints stay.
    """
    final = checkpoint_path(folder, checkpoint.step)
    temporary = hidden(final, "writing")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file({name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()},
                  temporary / TENSORS)  # fmt: skip
        (temporary / STATE).write_text(json.dumps({"step": checkpoint.step, **checkpoint.state}), encoding="utf-8")
        files = {name: describe(temporary / name) for name in (TENSORS, STATE)}
        (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}), encoding="utf-8")
        for name in (TENSORS, STATE, MANIFEST):
            _flush(temporary / name)
        _flush(temporary)
        remove(final)
        temporary.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.tensors.values())
        cause = no_room(folder, needed) if is_full(error) else f"{reason(error)}"
        raise CheckpointError(
            f"checkpoint of step {checkpoint.step} could not be written to {folder}: {cause}; "
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
    if not folder.is_dir():
        return None
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
        CheckpointError: a file is missing, has another length or digest than the manifest says, or cannot be parsed.
    """
    try:
        manifest = parse_json((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"checkpoint {path} has format {manifest['format']}; this version reads {FORMAT}")
        for name, expected in manifest["files"].items():
            found = describe(path / name)
            if found != expected:
                raise CheckpointError(
                    f"checkpoint {path} is corrupt: {name} has {found['bytes']} bytes and digest "
                    f"{found['blake2b'][:12]}, its manifest says {expected['bytes']} and {expected['blake2b'][:12]}"
                )
        state = parse_json((path / STATE).read_text(encoding="utf-8"))
        tensors = load_file(path / TENSORS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is torn: {reason(error)}") from error
    return Checkpoint(step=int(state.pop("step")), tensors=tensors, state=state)


def _flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _steps(folder: Path) -> list[int]:
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted(int(name) for name in names if name.isdigit())

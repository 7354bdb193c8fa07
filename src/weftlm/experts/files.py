"""Bytes in and out for the experts room: whole files only, forced to disk, and parsers that trust nothing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weftlm.errors import ExpertError, reason
from weftlm.files import parse_json

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
GATE, STATISTICS = "gate.safetensors", "statistics.safetensors"
METADATA = "weftlm"
"""Key of the facts in the metadata of a gate's and of statistics' file."""


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and force it to disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Force a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def explained_writing(what: str, folder: Path) -> Iterator[None]:
    """Turn a failure to write an expert or a library into an ExpertError that says what to do."""
    try:
        yield
    except OSError as error:
        cure = "free some space" if error.errno == errno.ENOSPC else "see that the folder is writable"
        raise ExpertError(f"{what}: cannot write {folder}: {error.strerror or error}; {cure}") from error


def describe(data: bytes) -> dict[str, Any]:
    """Length and BLAKE2b-128 digest of a file's contents."""
    return {"bytes": len(data), "blake2b": hashlib.blake2b(data, digest_size=16).hexdigest()}


def to_json(name: str, what: str, value: Mapping[str, Any]) -> str:
    """A mapping of JSON values as text.

    Raises:
        ExpertError: it holds something JSON cannot, NaN and infinity included.
    """
    try:
        return json.dumps(dict(value), indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ExpertError(
            f"expert {name!r}: {what} must hold JSON values (text, finite numbers, lists, mappings): {reason(error)}"
        ) from error


def parse_tensors(name: str, file: str, data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ExpertError: it is truncated, malformed or of an unknown type.
    """
    from safetensors import SafetensorError  # noqa: PLC0415
    from safetensors.torch import load  # noqa: PLC0415 - torch; listing a library needs none

    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise ExpertError(
            f"expert {name!r}: {file} is truncated or not safetensors ({reason(error)}); copy or export it again"
        ) from error


def parse_metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file that `parse_tensors` took; {} where there is none."""
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found = header.get("__metadata__", {})
    return found if isinstance(found, dict) else {}

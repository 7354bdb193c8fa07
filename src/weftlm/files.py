"""Files and folders that appear whole or not at all: written beside their place and renamed into it.

A reader sees the old one or the new one, never half of one, also where two processes write the same. What a killed
process leaves behind begins with a dot and ends with `.writing`.
"""

from __future__ import annotations

import json
import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from weftlm.errors import ConfigError, DataError, WeftError

_PACKAGE = Path(__file__).parent
_PROGRAMMING = (AssertionError, AttributeError, LookupError, NameError, TypeError)


@contextmanager
def whole(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Give a path to write to; it becomes `path` when the block ends, and is dropped when the block fails.

    Args:
        path: of the file.
        sync: force it to disk before it takes its place.
    """
    temporary = _beside(path)
    try:
        yield temporary
        if sync:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str, *, sync: bool = False) -> None:
    """Write a text file, UTF-8; see `whole`."""
    with whole(path, sync=sync) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cause(error: Exception) -> str:
    """Why something of the user's could not be read, in one line.

    Args:
        error: whatever a library raised while it read.
    Raises:
        Exception: `error` itself where it is no fault of the data: an error of weftlm's own making (`WeftError`), or a
            programming error raised by weftlm's own code.
    """
    if isinstance(error, WeftError):
        raise error
    if isinstance(error, _PROGRAMMING):
        innermost = traceback.extract_tb(error.__traceback__)[-1].filename
        if Path(innermost).is_relative_to(_PACKAGE):
            raise error
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} at offset {error.start} is not UTF-8"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def read_object(path: Path, cure: str) -> dict[str, Any] | None:
    """Read a JSON file that holds an object; None where there is none.

    Args:
        path: of the file.
        cure: what to do about a torn one, for the message.
    Raises:
        DataError: it is torn or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); {cure}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object; {cure}")
    return found


@contextmanager
def whole_folder(folder: Path, what: str) -> Iterator[Path]:
    """Give a new folder to fill; it becomes `folder` when the block ends, and is dropped when the block fails.

    Args:
        folder: new, or there and empty.
        what: goes into it, for the message.
    Raises:
        ConfigError: it is not empty, or a file.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; choose a new folder for the {what} or remove it")
    making = _beside(folder)
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        yield making
        if folder.exists():
            folder.rmdir()
        making.rename(folder)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.writing")

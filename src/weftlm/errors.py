"""The errors weftlm raises for causes a user can repair.

A message says what came, what is allowed and what to do. `assert` is for weftlm's own bugs. Only the command line turns
these into exit codes.
"""

from __future__ import annotations

import difflib
import errno
import json
import re
from collections.abc import Iterable

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_NUMBERED = re.compile(r"\[(Errno|WinError) -?\d+\] ")


class WeftError(Exception):
    """Base of every error whose cause is outside weftlm; its text is without the numbers of system errors."""

    def __str__(self) -> str:
        return _NUMBERED.sub("", super().__str__())


class ConfigError(WeftError, ValueError):
    """A recipe, an argument or an option is wrong."""


class DataError(WeftError):
    """Text, token shards or prepared data are missing, broken, changed or leaking between sets."""


class CheckpointError(WeftError):
    """A checkpoint cannot be written, or is torn, corrupt or of another run."""


class NumericsError(WeftError):
    """A number that must be finite or normalised is not."""


class ExpertError(WeftError):
    """An expert, its adapter or its gate cannot be used."""


def reason(error: BaseException) -> str:
    """Why a file could not be read or written, or a library failed, in words and on one line, for an error message."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.start:,})"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg})"
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if isinstance(error, RecursionError):
        return "its values are nested too deep"
    if "integer string conversion" in str(error):
        return "a number in it has too many digits"
    if isinstance(error, OSError) and error.errno is not None:
        full = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        return (full or "the system gives no reason").lower()
    if "null byte" in str(error) or "null character" in str(error):
        return "its name holds a NUL character"
    if isinstance(error, WeftError):
        return str(error)
    said = " ".join(_ESCAPES.sub("", str(error)).strip().split("\n\n")[0].split())[:200]
    return f"{said} is missing or unknown" if isinstance(error, KeyError) else said or type(error).__name__


def install_hint(extra: str) -> str:
    """The command that installs an optional dependency group of weftlm, for an error message.

    weftlm is not on a package index, so the command installs from a checkout: a bare name could bring
    another project's code.
    """
    return f"run `pip install '.[{extra}]'` in your checkout of weftlm"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest known name, else the list of what is allowed."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(names)}"

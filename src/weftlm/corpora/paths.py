"""The files of a corpus: of a folder, a glob or a name, without ever leaving the folder or waiting for a pipe.

Links to folders are never followed, so cycles do no harm. A link to a file counts as the file where it stays within the
folder that is searched (for a snapshot in the cache of the Hugging Face hub: within the cache of that repository);
links that leave it, and pipes, sockets and devices, are left out and reported.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from weftlm.errors import DataError, reason
from weftlm.places import near

Ignore = Callable[[str], None]
"""Called with an entry that is left out, and why."""

_MAGIC = re.compile(r"[*?[]")


def corpus_files(path: str, ignore: Ignore) -> tuple[list[Path], bool]:
    """The files that a path names, in order of path, and whether it is a folder that was searched.

    Args:
        path: Path of a file, a folder, or a glob in which `**` stands for any folders.
        ignore: Called with what is left out of a folder or a glob.
    Raises:
        DataError: Nothing matches, what matches is no regular file, or a folder cannot be read.
    """
    left: list[str] = []

    def note(entry: str) -> None:
        left.append(entry)
        ignore(entry)

    try:
        place = Path(path).expanduser()
        if place.is_dir():
            return list(_below(place, [("**",)], _root(place), note)), True
        if place.exists():
            if not place.is_file():
                raise DataError(
                    f"path {path!r} is no regular file (a pipe, socket or device); write its text to a file first"
                )
            return [place], False
        fixed = next((number for number, part in enumerate(place.parts) if _MAGIC.search(part)), len(place.parts))
        folder = Path(*place.parts[:fixed])
        found = sorted(_below(folder, [place.parts[fixed:]], _root(folder), note)) if folder.is_dir() else []
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"path {path!r} cannot be read: {reason(error)}") from error
    if not found:
        hint = f"; left out: {left[0]}" if left else near(path) or "; check the spelling"
        raise DataError(f"path {path!r} matches no file (looked from {Path.cwd()}){hint}")
    return found, False


def dataset_files(folder: Path) -> list[Path]:
    """All files of a local data set, which another library opens by itself, in order of path.

    Raises:
        DataError: One is no regular file, or a link that leaves the folder.
    """

    def refuse(entry: str) -> None:
        raise DataError(f"dataset {str(folder)!r} holds {entry}; remove it")

    return corpus_files(str(folder), refuse)[0]


def _below(folder: Path, globs: Iterable[tuple[str, ...]], root: Path, ignore: Ignore) -> Iterator[Path]:
    """The files below a folder whose path from there matches a glob, given by its parts."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        left = _after(entry.name, globs)
        if entry.is_dir(follow_symlinks=False):
            if deeper := left - {()}:
                yield from _below(Path(entry.path), deeper, root, ignore)
        elif left & {(), ("**",)} and _is_wanted(entry, root, ignore):
            yield Path(entry.path)


def _after(name: str, globs: Iterable[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """What is left of globs once the next part of a path has matched; hidden names match only what begins with a dot.

    Example: `src` leaves `**/*.py` and nothing else of `**/*.py`; `a.py` leaves that and the empty rest, a match.
    """
    left: set[tuple[str, ...]] = set()
    for glob in globs:
        if glob[:1] == ("**",):
            left |= _after(name, [glob[1:]])
            if not name.startswith("."):
                left.add(glob)
        elif glob and fnmatchcase(name, glob[0]) and (glob[0].startswith(".") or not name.startswith(".")):
            left.add(glob[1:])
    return left


def _is_wanted(entry: os.DirEntry[str], root: Path, ignore: Ignore) -> bool:
    """Whether an entry that is no folder is a regular file within the folder searched."""
    why = ""
    try:
        if not stat.S_ISREG(entry.stat().st_mode):
            why = "a pipe, socket, device or link to a folder"
        elif entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
            why = "a link that leaves the folder"
    except OSError as error:
        why = reason(error)
    if why:
        ignore(f"{entry.path} ({why})")
    return not why


def _root(folder: Path) -> Path:
    """What links of a folder may not leave: itself, or the cache of the hub's repository that it is a snapshot of."""
    here = folder.resolve()
    for parent in here.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent
    return here

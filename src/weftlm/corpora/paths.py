"""The files of a corpus: of a folder, a glob or a name, without ever leaving the folder or waiting for a pipe.

Links to folders are never followed, so cycles do no harm. A link to a file counts as the file where it stays within the
folder that is searched (for a snapshot in the cache of the Hugging Face hub: within the cache of that repository);
links that leave it, and pipes, sockets and devices, are left out and reported.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from weftlm.errors import DataError
from weftlm.files import cause
from weftlm.places import near

Ignore = Callable[[str], None]
"""Called with an entry that is left out, and why."""

_MAGIC = re.compile(r"[*?[]")


def corpus_files(path: str, ignore: Ignore) -> tuple[list[Path], bool]:
    """The files that a path names, in order of path, and whether it is a folder that was searched.

    Args:
        path: of a file, a folder, or a glob in which `**` stands for any folders.
        ignore: takes what is left out of a folder or a glob.
    Raises:
        DataError: nothing matches, what matches is no regular file, or a folder cannot be read.
    """
    try:
        place = Path(path).expanduser()
        if place.is_dir():
            return list(_below(place, _root(place), ignore)), True
        if place.exists():
            if not place.is_file():
                raise DataError(f"path {path!r} is {_kind(place.stat().st_mode)}, not a file; write it to a file first")
            return [place], False
        left: list[str] = []

        def note(entry: str) -> None:
            left.append(entry)
            ignore(entry)

        found = sorted(set(_matches(place, note)))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"path {path!r} cannot be read: {cause(error)}") from error
    if not found:
        hint = f"; left out: {left[0]}" if left else near(path) or "; check the spelling"
        raise DataError(f"path {path!r} matches no file (looked from {Path.cwd()}){hint}")
    return found, False


def dataset_files(folder: Path) -> list[Path]:
    """All files of a local data set, which another library opens by itself, in order of path.

    Raises:
        DataError: one is no regular file, or a link that leaves the folder.
    """

    def refuse(entry: str) -> None:
        raise DataError(f"dataset {str(folder)!r} holds {entry}; remove it")

    try:
        return list(_below(folder, _root(folder), refuse))
    except OSError as error:
        raise DataError(f"dataset {str(folder)!r} cannot be read: {cause(error)}") from error


def _below(folder: Path, root: Path, ignore: Ignore) -> Iterator[Path]:
    for entry in _listed(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _below(Path(entry.path), root, ignore)
        elif _is_wanted(entry, root, ignore):
            yield Path(entry.path)


def _matches(pattern: Path, ignore: Ignore) -> Iterator[Path]:
    """The files that match a glob, found from its part before the first wildcard on."""
    parts = pattern.parts
    fixed = next((number for number, part in enumerate(parts) if _MAGIC.search(part)), len(parts))
    if fixed == len(parts):
        return iter(())
    folder = Path(*parts[:fixed])
    wanted = [part for before, part in pairwise(("", *parts[fixed:])) if not before == part == "**"]
    return _matching(folder, wanted, _root(folder), ignore) if folder.is_dir() else iter(())


def _matching(folder: Path, parts: list[str], root: Path, ignore: Ignore) -> Iterator[Path]:
    part, rest = parts[0], parts[1:]
    if part == "**" and rest:
        yield from _matching(folder, rest, root, ignore)
    for entry in _listed(folder, hidden=part.startswith(".")):
        if entry.is_dir(follow_symlinks=False):
            if part == "**":
                yield from _matching(Path(entry.path), parts, root, ignore)
            elif rest and fnmatch.fnmatchcase(entry.name, part):
                yield from _matching(Path(entry.path), rest, root, ignore)
        elif not rest and (part == "**" or fnmatch.fnmatchcase(entry.name, part)) and _is_wanted(entry, root, ignore):
            yield Path(entry.path)


def _listed(folder: Path, *, hidden: bool = False) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if hidden or not e.name.startswith(".")), key=lambda entry: entry.name)


def _is_wanted(entry: os.DirEntry[str], root: Path, ignore: Ignore) -> bool:
    """Whether an entry that is no folder is a regular file within the folder searched."""
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        ignore(f"{entry.path} ({cause(error)})")
        return False
    if not stat.S_ISREG(mode):
        ignore(f"{entry.path} ({_kind(mode)})")
        return False
    if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
        ignore(f"{entry.path} (a link that leaves the folder)")
        return False
    return True


def _root(folder: Path) -> Path:
    """What links of a folder may not leave: itself, or the cache of the hub's repository that it is a snapshot of."""
    here = folder.resolve()
    for parent in here.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent
    return here


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a link to a folder"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"

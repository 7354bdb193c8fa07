"""Files and folders that appear whole or not at all, disappear at once, and are checked when they are read.

Writing: what is written goes beside its place and is renamed into it, so that a reader sees the old one or the new one,
never half of one, also where two processes write the same. Removing: what is removed loses its name first. Both use
hidden names, `.NAME.PID@HOST.writing` and `.NAME.PID@HOST.removing`; what a killed process leaves under such a name is
removed by `sweep`, which every holder of a lock (`weftlm.artifact.locked`) calls.

Checking: a JSON object has a checksum over itself (`write_object`), and a finished folder a list of its files with
their sizes and BLAKE2b digests (`seal`), which readers compare. That costs about a second per gigabyte and core.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from weftlm.errors import CheckpointError, ConfigError, DataError, WeftError, reason

SEAL = "digests.json"
_SEAL_FORMAT = "weftlm digests 1"
_CHECKSUM = "checksum"
_DECIDING = re.compile(r"(.*/)?((adapter_|generation_)?config\.json|[^/]*\.(safetensors|index\.json|bin|pt|pth|py))")
"""Files that decide what a folder is read as, which may not be added to a sealed one; notes and tokenizers may."""
_LEFT = re.compile(r"\..+\.(?P<pid>\d+)@(?P<host>.+)\.(writing|removing)")
_FORGOTTEN_S = 24 * 3600
"""Age at which what another machine was writing counts as left over."""


# -- writing ------------------------------------------------------------------------------------------------------


@contextmanager
def whole(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Give a path to write to; it becomes `path` when the block ends (with `sync`, on disk), unless the block fails."""
    temporary = hidden(path, "writing")
    try:
        yield temporary
        if sync:
            sync_file(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync_file(path: Path) -> None:
    """Force a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str, *, sync: bool = False) -> None:
    """Write a text file, UTF-8; see `whole`."""
    with whole(path, sync=sync) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(folder: Path, what: str, *, replace: bool = False, sync: bool = False) -> Iterator[Path]:
    """Give a new folder to fill; when the block ends it is sealed and becomes `folder`; a failure drops it.

    Args:
        folder: Folder to make; new, or there and empty.
        what: Name of what goes into it, for the message.
        replace: Whether to replace what is there, once the new one is whole.
        sync: Whether to force it to disk before it gets its name, and its name before what it replaces is removed.
    Raises:
        ConfigError: The folder is not empty, or a file.
        CheckpointError: The disk is full.
    """
    if not replace:
        refuse_full(folder, what)
    sweep(folder.parent)
    making = hidden(folder, "writing")
    _erase(making)
    with room(folder):
        making.mkdir(parents=True)
        try:
            yield making
            seal(making)
            for path in (*making.rglob("*"), making) if sync else ():
                sync_file(path)
            leaving = hidden(folder, "removing")
            if folder.exists():
                folder.rename(leaving)
            making.rename(folder)
            if sync:
                sync_file(folder.parent)
            _erase(leaving)
        except BaseException:
            _erase(making)
            raise


def refuse_full(folder: Path, what: str) -> None:
    """Raise ConfigError where a new folder is to go and there is a file, or a folder that is not empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; choose a new folder for the {what} or remove it")


@contextmanager
def room(folder: Path, needed: int | None = None) -> Iterator[None]:
    """Raise CheckpointError with place and size (`needed` bytes) where a library meets a full disk in the block."""
    try:
        yield
    except Exception as error:
        if isinstance(error, WeftError) or not _is_full(error):
            raise
        place = next((each for each in (folder, *folder.parents) if each.exists()), Path())
        wanted = "" if needed is None else f"{needed / 1e6:,.1f} MB needed, "
        raise CheckpointError(
            f"cannot write {folder}: the disk is full, or a quota or limit is reached ({wanted}"
            f"{shutil.disk_usage(place).free / 1e6:,.1f} MB free); what was finished before is kept: make room and run "
            "the same command again"
        ) from error


def _is_full(error: Exception) -> bool:
    """Whether an error of any library is that of a full disk, quota or file-size limit."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return any(text in str(error) for text in ("No space left", "Disk quota exceeded", "File too large"))


# -- removing -----------------------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    """Remove a file or a folder; a folder loses its name before its files go, so that no half of it is ever seen."""
    if path.is_dir() and not path.is_symlink():
        leaving = hidden(path, "removing")
        _erase(leaving)
        path.rename(leaving)
        _erase(leaving)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what processes that are gone left half-written or half-removed in a folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        found = _LEFT.fullmatch(path.name)
        if found is None:
            continue
        with suppress(OSError):
            if not _works(found["pid"], found["host"], path):
                _erase(path)


def _works(pid: str, host: str, path: Path) -> bool:
    """Whether the process that made a hidden file may still be at work on it."""
    if host != this_host():
        return time.time() - path.stat().st_mtime < _FORGOTTEN_S
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _erase(path: Path) -> None:
    """Delete what no reader looks at."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def hidden(path: Path, what: str) -> Path:
    """The name beside a path under which this process writes or removes it; `sweep` knows it."""
    return path.with_name(f".{path.name}.{os.getpid()}@{this_host()}.{what}")


def this_host() -> str:
    """The name of this machine, as hidden names and locks carry it."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", platform.node())


# -- reading -----------------------------------------------------------------------------------------------------------


def parse_json(text: str | bytes) -> Any:
    """JSON of unknown origin; ValueError whatever is wrong with it, endless nesting too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(reason(RecursionError())) from None


# -- checking -----------------------------------------------------------------------------------------------------


def checksum(value: Any) -> str:
    """BLAKE2b-128 of a JSON value in canonical form."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":")).encode("utf-8")
    return hashlib.blake2b(canonical, digest_size=16).hexdigest()


def write_object(path: Path, value: Mapping[str, Any], *, sync: bool = False, nan: bool = True) -> None:
    """Write a JSON object with a checksum over itself, whole; `read_object` compares. `nan` allows NaN and infinity."""
    plain = json.loads(json.dumps(dict(value), allow_nan=nan))
    write_whole(path, json.dumps({**plain, _CHECKSUM: checksum(plain)}, indent=1) + "\n", sync=sync)


def read_object(path: Path, cure: str) -> dict[str, Any] | None:
    """Read a JSON file that holds an object; None where there is none.

    Raises:
        DataError: It is torn, holds something else, or was altered since `write_object` wrote it; the message ends with
            `cure`, which says what to do about it.
    """
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({reason(error)}); {cure}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object; {cure}")
    stated = found.pop(_CHECKSUM, None)
    if stated is not None and stated != checksum(found):
        raise DataError(f"{path} was altered since it was written (its checksum differs); {cure}")
    return found


def describe(path: Path) -> dict[str, Any]:
    """Size and BLAKE2b-128 digest of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "blake2b": digest}


def seal(folder: Path) -> None:
    """List the files of a finished folder with their sizes and digests, in `digests.json`; hidden ones do not count."""
    write_object(folder / SEAL, {"format": _SEAL_FORMAT, "files": _described(folder, _files(folder))})


def check_sealed(folder: Path, cure: str, *, closed: bool = False) -> None:
    """Compare a folder with its seal; one without a seal passes, since other programs make none.

    Raises:
        DataError: A file is missing, cut short or altered, or weights or settings were added; the message names it and
            ends with `cure`, which says what to do about it. With `closed` no file at all may be added.
    """
    stated = read_object(folder / SEAL, cure)
    if stated is None:
        return
    cure = f"{cure}; after a change of your own delete {folder / SEAL}"
    listed = stated.get("files")
    if stated.get("format") != _SEAL_FORMAT or not isinstance(listed, dict):
        raise DataError(f"{folder / SEAL} is of another format than {_SEAL_FORMAT!r}; {cure}")
    found = set(_files(folder))
    added = {name for name in found - listed.keys() if closed or _DECIDING.fullmatch(name)}
    if added:
        raise DataError(f"{folder / min(added)} was added since {folder} was finished; {cure}")
    check_listed(folder, listed, cure)


def check_listed(folder: Path, listed: Mapping[str, Mapping[str, Any]], cure: str) -> None:
    """Compare files with what `describe` said of them, by path in the folder; every byte is read.

    Raises:
        DataError: A file is missing, cut short or altered; the message names it and ends with `cure`.
    """
    for name, facts in listed.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            raise DataError(f"{folder / name} is missing since {folder} was finished; {cure}") from None
        if size != facts["bytes"]:
            raise DataError(f"{folder / name} has {size} bytes, {facts['bytes']} when it was written; {cure}")
    for name, facts in _described(folder, list(listed)).items():
        if facts != listed[name]:
            raise DataError(f"{folder / name} was altered since it was written (its digest differs); {cure}")


def _files(folder: Path) -> list[str]:
    """Files below a folder, by their paths in it; hidden ones and the seal left out."""
    every = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in every if path.name != SEAL and not any(p[0] == "." for p in path.parts))


def _described(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return dict(zip(names, pool.map(lambda name: describe(folder / name), names), strict=True))

"""A result on disk: a record of what was made, of what, and which files belong to it; and locks on folders.

An artifact is a JSON record beside the files it lists. Its identity is everything that decides it and nothing else:
`settings` of sections by an explicit choice of keys, fingerprints of texts and models, ids of other artifacts.

    gate = Artifact(folder / "fit.json", {"scores": scores.fingerprint, "settings": settings(config)}, cure="fit again")
    with locked(folder / ".lock", refusal):
        if (facts := gate.reuse()) is not None:
            return facts                              # finished, and of this identity
        if not gate.resume():
            gate.begin()                              # what is there is of something else, or nothing
        ...                                           # work that can be interrupted
        return gate.finish(facts, ["gate.safetensors"])

A key that a later version adds to a section does not change what was made before it: see `weftlm.config.Settings`.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from weftlm.config import differences
from weftlm.errors import CheckpointError, WeftError
from weftlm.files import check_listed, checksum, describe, parse_json, read_object, sweep, this_host, write_object

_IDENTITY, _FILES = "identity", "files"


class Artifact:
    """A result that is reused, resumed or made, by its identity.

    Args:
        record: The JSON file that says it is finished; the files it lists are beside it or below.
        identity: All that decides it, as JSON values.
        cure: What to do about a torn or altered file, for messages.
    """

    def __init__(self, record: Path, identity: Mapping[str, Any], cure: str) -> None:
        self.record, self.identity, self.cure = record, dict(identity), cure
        self.begun = record.with_name(f".{record.stem}.begun.json")

    @property
    def id(self) -> str:
        """A digest by which other results refer to this one: of its identity as it was first written."""
        same = (found for found in map(self._read, (self.record, self.begun)) if found and not self._changed(found))
        return checksum(next(same, {_IDENTITY: self.identity})[_IDENTITY])

    def changed(self) -> str | None:
        """How the identity of what is there, finished or begun, differs from this one; None where it does not.

        Raises:
            DataError: a record is torn or altered.
        """
        found = self._read(self.record) or self._read(self.begun)
        return None if found is None else self._changed(found) or None

    def reuse(self) -> dict[str, Any] | None:
        """The facts of the finished result, its files compared with their digests; None where it is not finished.

        Raises:
            DataError: the record or a file is missing, torn or altered.
        """
        found = self._read(self.record)
        if found is None or self._changed(found):
            return None
        check_listed(self.record.parent, found.pop(_FILES, {}), self.cure)
        return found

    def resume(self) -> bool:
        """Whether unfinished work of this identity is there.

        Raises:
            DataError: its record is torn or altered.
        """
        found = self._read(self.begun)
        return found is not None and not self._changed(found)

    def begin(self, **notes: Any) -> None:
        """Note that the work of this identity begins; a result of another one stays until `finish`.

        Args:
            notes: What else to note, as JSON values, for `last`.
        """
        self.begun.parent.mkdir(parents=True, exist_ok=True)
        write_object(self.begun, {_IDENTITY: self.identity, **notes})

    def finish(self, facts: Mapping[str, Any], files: Sequence[str] = (), *, nan: bool = False) -> dict[str, Any]:
        """Write the record; from now on the result is reused.

        Args:
            facts: What the record says beside identity and files, as JSON values.
            files: Files that belong to it, by their paths from the record's folder.
            nan: Whether facts may hold NaN and infinity, which are not JSON.
        Returns:
            The facts with the identity.
        """
        found = {_IDENTITY: self.identity, **facts}
        listed = {name: describe(self.record.parent / name) for name in files}
        write_object(self.record, {**found, _FILES: listed}, sync=True, nan=nan)
        self.begun.unlink(missing_ok=True)
        plain: dict[str, Any] = parse_json(json.dumps(found))
        return plain

    def last(self) -> tuple[bool, dict[str, Any]] | None:
        """Whether what is there is finished, and its record, of any identity: of work under way, or of the result.

        Raises:
            DataError: the record is torn or altered.
        """
        for path in (self.begun, self.record):
            if (found := self._read(path)) is not None:
                return path == self.record, found
        return None

    def _read(self, path: Path) -> dict[str, Any] | None:
        return read_object(path, self.cure)

    def _changed(self, found: Mapping[str, Any]) -> str:
        return differences(found.get(_IDENTITY), self.identity)


def refuse_other(artifact: Artifact, what: str, cure: str) -> None:
    """Refuse a place that holds a result, finished or begun, of another identity.

    Args:
        artifact: The result that is wanted there.
        what: Names what is there, for the message.
        cure: What to do about it.
    Raises:
        CheckpointError: it does; the message says what differs.
    """
    if (changed := artifact.changed()) is not None:
        raise CheckpointError(f"{artifact.record.parent} holds {what} of something else ({changed}); {cure}")


# -- one process at a time ----------------------------------------------------------------------------------------


@contextmanager
def locked(
    lock: Path,
    refusal: Callable[[str], WeftError],
    *,
    again: bool = False,
    patience_s: float = 0.0,
    waiting: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Hold a lock against other processes, and sweep its folder; free again however this process ends.

    Args:
        lock: The file, which names its holder for messages; its folder is made.
        refusal: Makes the error, given a description of the process that holds the lock.
        again: Pass where this thread holds it already.
        patience_s: Seconds to wait for it.
        waiting: Called once, with the same description, where it is not free at once.
    Raises:
        WeftError: `refusal`'s.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    instance = _instance(lock)
    if instance.is_locked:
        if not again:
            raise refusal(_holder(lock))
        yield
        return
    try:
        instance.acquire(timeout=0)
    except Timeout:
        if waiting is not None:
            waiting(_holder(lock))
        try:
            instance.acquire(timeout=patience_s)
        except Timeout:
            raise refusal(_holder(lock)) from None
    try:
        with suppress(OSError):  # a full disk
            command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
            lock.write_text(f"{os.getpid()} on {this_host()}: {command}\n", encoding="utf-8")
        sweep(lock.parent)
        yield
    finally:
        instance.release()


def is_locked(lock: Path) -> bool:
    """Whether another process holds a lock."""
    instance = _instance(lock)
    if not lock.exists() or instance.is_locked:
        return False
    try:
        with instance.acquire(timeout=0):
            return False
    except Timeout:
        return True


def _instance(lock: Path) -> FileLock:
    return FileLock(lock.resolve(), is_singleton=True)


def _holder(lock: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        said = lock.read_text(encoding="utf-8").strip()
        if said:
            return f"another process ({said.partition(chr(10))[0][:300]})"
    return "another process"

"""Deaths at every step: from a chosen change of the disk on, nothing more is changed, as after `kill -9`."""

from __future__ import annotations

import builtins
import io
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from weftlm.artifact import locked
from weftlm.errors import CheckpointError
from weftlm.interrupt import Stopped, handled

_CHANGES = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "link", "truncate")


class Killed(BaseException):
    """The process is dead; what still runs of it changes nothing."""


class Countdown:
    """Counts changes of the disk and dies at one of them.

    Attributes:
        left: changes still to come before the death.
        die: how, where not by `Killed`.
        begun: changes so far.
        dead: whether it has happened.
    """

    def __init__(self, left: int, die: Callable[[], object] | None = None) -> None:
        self.left = left
        self.die = die
        self.begun = 0
        self.dead = False

    def __call__(self) -> None:
        self.dead = self.dead or self.left == 0
        self.left -= 1
        self.begun += 1
        if self.dead:
            if self.die is not None:
                self.die()
            raise Killed


def dead_process() -> int:
    """The number of a process that has ended."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def host() -> str:
    """This machine, as hidden names have it."""
    return "".join(each if each.isalnum() or each == "-" else "-" for each in os.uname().nodename)


@contextmanager
def held_by_another(lock: Path) -> Iterator[int]:
    """Let another process hold a lock; gives its number."""
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with locked(lock, CheckpointError):
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            os._exit(0)
    os.read(ready[0], 1)
    try:
        yield child
    finally:
        os.write(go[1], b"x")
        os.waitpid(child, 0)


def stopped(call: Callable[[], object]) -> Stopped:
    """How a call ends that is asked to stop."""
    try:
        with handled():
            call()
    except Stopped as found:
        return found
    raise AssertionError("it went on")


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """Let no file of this process grow beyond some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def killing(step: int, die: Callable[[], object] | None = None) -> Iterator[Countdown]:
    """Die at a change of the disk: renaming, removing, making a folder, opening a file to write, writing to it.

    Args:
        step: the change that no longer happens, counted from 0.
        die: how, where not by `Killed`, after which what still runs changes nothing.
    """
    count = Countdown(step, die)
    opened, opened_low = io.open, os.open

    def changing(name: str) -> Any:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            count()
            return real(*arguments, **options)

        return call

    def open_counted(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        changes = set(mode) & set("wxa+")
        if changes:
            count()
        found = opened(file, mode, *arguments, **options)
        if changes:
            try:
                count()
            except Killed:
                found.close()
                raise
        return found

    def open_low(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            count()
        return opened_low(path, flags, *arguments, **options)

    with (
        mock.patch.multiple(os, **{name: changing(name) for name in _CHANGES}, open=open_low),
        mock.patch.object(io, "open", open_counted),
        mock.patch.object(builtins, "open", open_counted),
    ):
        yield count


def flip(path: Path, place: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)

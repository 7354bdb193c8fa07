"""Deaths at every step: from a chosen change of the disk on, nothing more is changed, as after `kill -9`."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

_CHANGES = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "link", "truncate")


class Killed(BaseException):
    """The process is dead; what still runs of it changes nothing."""


class Countdown:
    """Counts changes of the disk and dies at one of them.

    Attributes:
        left: changes still to come before the death.
        dead: whether it has happened.
    """

    def __init__(self, left: int) -> None:
        self.left = left
        self.dead = False

    def __call__(self) -> None:
        self.dead = self.dead or self.left == 0
        self.left -= 1
        if self.dead:
            raise Killed


@contextmanager
def killing(step: int) -> Iterator[Countdown]:
    """Die at a change of the disk: renaming, removing, making a folder, opening a file to write.

    Args:
        step: the change that no longer happens, counted from 0.
    """
    count = Countdown(step)
    opened, opened_low = io.open, os.open

    def changing(name: str) -> Any:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            count()
            return real(*arguments, **options)

        return call

    def open_counted(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if set(mode) & set("wxa+"):
            count()
        return opened(file, mode, *arguments, **options)

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

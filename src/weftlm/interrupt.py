"""Ctrl-C and SIGTERM: a long command stops at the next safe point, with its state on disk, and says how to go on.

Inside `safe_points` a signal waits for the next `point`, which keeps the state and stops; elsewhere it stops at once,
since whatever is finished is on disk whole. A second signal ends the process on the spot, which costs what was done
since the last safe point and damages nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """The command was asked to stop and did, with what it had finished on disk.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.code = 128 + number
        """The exit code shells give a process that a signal ended."""


class _State:
    """The signal this process received, how deep it is in `safe_points`, and the options that are done with."""

    asked: int | None = None
    depth: int = 0
    done_with: tuple[str, ...] = ()


@contextmanager
def handled() -> Iterator[None]:
    """Answer SIGINT and SIGTERM as described above while the block runs; in threads other than the first, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.signal(each, _on_signal) for each in _SIGNALS]
    _State.asked, _State.done_with = None, ()
    try:
        yield
    finally:
        for each, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(each, handler)
        _State.asked = None


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _State.asked is not None:
        end_children()
        os._exit(128 + number)
    _State.asked = number
    if _State.depth == 0:
        raise Stopped(number)
    sys.stderr.write("\nweftlm: stopping at the next safe point; once more stops at once\n")
    sys.stderr.flush()


@contextmanager
def safe_points() -> Iterator[None]:
    """Let signals wait for the next `point` while the block runs, or for its end."""
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
    if _State.depth == 0:
        point()


def asked() -> bool:
    """Whether this process was asked to stop."""
    return _State.asked is not None


def point(keep: Callable[[], None] | None = None) -> None:
    """Stop here where that was asked for.

    Args:
        keep: Function that puts the state on disk first.
    Raises:
        Stopped: A signal came.
    """
    if asked():
        if keep is not None:
            keep()
        stop()


def stop() -> None:
    """Stop here, because this process or another of its group was asked to.

    Raises:
        Stopped: Always.
    """
    raise Stopped(_State.asked or signal.SIGTERM)


def done_with(*options: str) -> None:
    """Say that the command goes on without some options: what they discard has been discarded."""
    _State.done_with += options


def how_to_go_on(stopped: Stopped) -> str:
    """One line for a person: that nothing finished is lost, and what to do."""
    typed = {word.partition("=")[0] for word in sys.argv}
    without = " and ".join(option for option in _State.done_with if option in typed)
    again = f"run the command again{f' without {without}' if without else ''} to go on"
    return f"weftlm: stopped by {signal.Signals(stopped.number).name}; what is finished is kept: {again}"


def end_children() -> None:
    """Ask processes this one has started to stop."""
    if "multiprocessing" in sys.modules:  # otherwise there are none, and help and errors need not load it
        for child in sys.modules["multiprocessing"].active_children():
            child.terminate()

"""What a long job shows on stderr: rich's bar on a terminal, a plain line now and then anywhere else.

Nothing is written to stdout.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from weftlm.text import printable

_LINE_SECONDS = 10.0
"""Pause between plain lines."""


def count_text(count: float) -> str:
    """A count in three significant digits: 950, 31.0k, 1.24M, 3.00G; `-` where it is not finite."""
    if not math.isfinite(count):
        return "-"
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= scale * 0.9995:
            return f"{count / scale:#.3g}".rstrip(".") + suffix
    return f"{count:.0f}" if abs(count) >= 99.95 or float(count).is_integer() else f"{count:.1f}"


def duration_text(seconds: float) -> str:
    """A duration in its two largest units: <1s, 42s, 3m 20s, 2h 05m, 3d 04h; `-` where it is not finite."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    whole = round(seconds)
    for size, part, large, small in ((86400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s")):
        if whole >= size:
            return f"{whole // size}{large} {whole % size // part:02d}{small}"
    return f"{whole}s" if whole or not seconds else "<1s"


def weights_text(weights: Mapping[str, float], top: int) -> str:
    """The `top` largest weights, largest first, ties by name: `code 0.41, prose 0.22, +7 more 0.37`."""
    order = sorted(weights, key=lambda name: (-weights[name], name))
    shown = [f"{name} {weights[name]:.2f}" for name in order[:top]]
    if rest := order[top:]:
        shown.append(f"+{len(rest)} more {sum(weights[name] for name in rest):.2f}")
    return ", ".join(shown)


def write_line(line: str) -> None:
    """Write one line on stderr; names in it may hold anything."""
    sys.stderr.write(printable(line) + "\n")
    sys.stderr.flush()


class Pace:
    """Time left at the mean pace since the start, which a resumed job does not have at 0.

    Args:
        done: Units done at the start, which is now; None: the start is the first report.
    """

    def __init__(self, done: float | None = None) -> None:
        self._start = None if done is None else (time.monotonic(), done)

    def eta(self, done: float, total: float) -> str:
        """`ETA 3m 20s`; `ETA -` while there is no pace yet."""
        now = time.monotonic()
        self._start = self._start or (now, done)
        seconds, units = now - self._start[0], done - self._start[1]
        left = 0.0 if done >= total else (total - done) * seconds / units if units > 0 and seconds > 0 else math.nan
        return f"ETA {duration_text(left)}"


class ProgressBar:
    """Progress of a job on stderr, a context manager; its last plain line always comes, unless the job failed.

    Args:
        description: Name of the job ("tokenise code").
        total: Units altogether; None when it is not known.
        unit: Unit counted, plural.
        done: Units that were done before, by another process.
        enabled: Whether to show anything (not on ranks other than the first).

    Example:
        >>> with ProgressBar("tokenise code", total=3, unit="documents") as bar:
        ...     for _ in range(3):
        ...         bar.advance()
    """

    def __init__(
        self,
        description: str,
        total: float | None = None,
        *,
        unit: str = "items",
        done: float = 0.0,
        enabled: bool = True,
    ) -> None:
        self._description, self._total, self._unit = printable(description), total, unit
        self._enabled, self._pace = enabled, Pace(done)
        self._start, self._next_line = (time.monotonic(), done), time.monotonic() + _LINE_SECONDS
        self.done = done
        self._note = ""
        self._bar: Progress | None = None
        if enabled and sys.stderr.isatty() and not (console := Console(stderr=True)).is_dumb_terminal:
            columns = (TextColumn("{task.description}", markup=False), BarColumn())
            status = TextColumn("{task.fields[status]}", markup=False)
            # Redirected, printed results would move onto stderr.
            self._bar = Progress(*columns, status, console=console, refresh_per_second=4, redirect_stdout=False)
            self._task = self._bar.add_task(self._description, total=total, status="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: Any, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._next_line = -math.inf
            self.update(self.done, self._note)

    def advance(self, count: float = 1.0) -> None:
        """`count` more units are done."""
        self.update(self.done + count)

    def update(self, done: float, note: str = "") -> None:
        """`done` units are done altogether; `note` is shown behind speed and time left."""
        self.done, self._note = done, note
        seconds, units = time.monotonic() - self._start[0], done - self._start[1]
        count = count_text(done) if self._total is None else f"{count_text(done)}/{count_text(self._total)}"
        speed = f"{count_text(units / seconds)} {self._unit}/s" if seconds > 0 and units > 0 else ""
        left = duration_text(seconds) if self._total is None else self._pace.eta(done, self._total)
        status = "  ".join(filter(None, (f"{count} {self._unit}", speed, left, printable(note))))
        if self._bar is not None:
            self._bar.update(self._task, completed=done, status=status)
        elif self._enabled and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_SECONDS
            write_line(f"{self._description} {status}")

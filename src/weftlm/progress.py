"""What a long job shows on stderr: rich's live bar on a terminal, a plain line now and then anywhere else.

A root module, because preparing, training and evaluating all report progress. Nothing is ever written to stdout.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from weftlm.text import printable, printable_lines

_SHOWN_WEIGHTS = 4


def count_text(count: float) -> str:
    """A count in three significant digits: 950, 31.0k, 1.24M, 3.00G; `-` where it is not finite."""
    if not math.isfinite(count):
        return "-"
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= scale * 0.9995:
            return f"{count / scale:#.3g}".rstrip(".") + suffix
    return f"{count:.0f}" if abs(count) >= 99.95 or float(count).is_integer() else f"{count:.1f}"


def duration_text(seconds: float) -> str:
    """A duration in its two largest units: 42s, 3m 20s, 2h 05m, 3d 04h; `-` where it is not finite."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    whole = round(seconds)
    for size, part, large, small in ((86400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s")):
        if whole >= size:
            return f"{whole // size}{large} {whole % size // part:02d}{small}"
    return f"{whole}s"


def weights_text(weights: Mapping[str, float], top: int) -> str:
    """The `top` largest weights, largest first, ties by name: `code 0.41, prose 0.22, +7 more 0.37`."""
    order = sorted(weights, key=lambda name: (-weights[name], name))
    shown = [f"{name} {weights[name]:.2f}" for name in order[:top]]
    if rest := order[top:]:
        shown.append(f"+{len(rest)} more {sum(weights[name] for name in rest):.2f}")
    return ", ".join(shown)


def write_line(line: str, stream: TextIO | None = None) -> None:
    """Write one line on stderr, or on another stream; names in it may hold anything."""
    stream = sys.stderr if stream is None else stream
    stream.write(printable(line) + "\n")
    stream.flush()


class Pace:
    """Time left at the mean pace since the start, which a resumed job does not have at 0.

    Args:
        done: Units done at the start, which is now; None: the start is the first report.
        clock: Clock in seconds, monotonic.
    """

    def __init__(self, done: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = None if done is None else (clock(), done)

    def eta(self, done: float, total: float) -> str:
        """`ETA 3m 20s`; `ETA -` while there is no pace yet."""
        now = self._clock()
        self._start = self._start or (now, done)
        seconds, units = now - self._start[0], done - self._start[1]
        left = 0.0 if done >= total else (total - done) * seconds / units if units > 0 and seconds > 0 else math.nan
        return f"ETA {duration_text(left)}"


class Display:
    """A long job on stderr: a bar on a terminal, elsewhere a plain line now and then. A context manager.

    Args:
        description: Name of the job; the bar's label.
        enabled: Whether to show anything (not on ranks other than the first).
        log_every_seconds: Pause between plain lines.
        first_line: Whether the first one comes at once.
        stream: Stream to write to; stderr when None.
        clock: Clock in seconds, monotonic.
    """

    def __init__(
        self,
        description: str = "train",
        *,
        enabled: bool = True,
        log_every_seconds: float = 10.0,
        first_line: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._description = printable(description)
        self._enabled = enabled
        self._every_seconds = log_every_seconds
        self._clock = clock
        self._pace = Pace(None if first_line else 0.0, clock)
        self._next_line = -math.inf if first_line else clock() + log_every_seconds
        self._bar: Progress | None = None
        if enabled and self._stream.isatty() and not (console := Console(file=self._stream)).is_dumb_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}", markup=False),
            )
            # Redirected, printed results would move onto stderr.
            self._bar = Progress(*columns, console=console, expand=True, refresh_per_second=4, redirect_stdout=False)
            self._task = self._bar.add_task(self._description, total=None, status="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, status: str, done: float, total: float | None, *, last: bool = False) -> None:
        """Show how far the job is.

        Args:
            status: State in words; a second line of it goes below the bar's first.
            done: Units done.
            total: Units altogether; None when it is not known.
            last: Whether to write the plain line at once.
        """
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, status=printable_lines(status))
        elif self._enabled and (last or self._clock() >= self._next_line):
            self._next_line = self._clock() + self._every_seconds
            write_line(f"{self._description} {status}".replace("\n", "  "), self._stream)


class TrainingDisplay(Display):
    """A training: steps, loss, tokens/s, time left and the largest mixture weights."""

    def update(
        self,
        step: int,
        total_steps: int,
        tokens: float,
        loss: float | None,
        tokens_per_second: float | None,
        weights: Mapping[str, float],
    ) -> None:
        """Show the state after a step.

        Args:
            step: Optimizer steps taken.
            total_steps: Steps the run will take.
            tokens: Training tokens seen.
            loss: Recent training loss, nats per token.
            tokens_per_second: Recent speed.
            weights: Mixture weights by domain.
        """
        parts = [f"{step}/{total_steps}", f"{count_text(tokens)} tokens"]
        if loss is not None:
            parts.append(f"loss {loss:.3f}")
        if tokens_per_second is not None:
            parts.append(f"{count_text(tokens_per_second)} tok/s")
        parts.append(self._pace.eta(step, total_steps))
        status = "  ".join(parts) + f"\nmixture {weights_text(weights, _SHOWN_WEIGHTS)}" * bool(weights)
        self.show(status, step, total_steps, last=step >= total_steps)


class ProgressCounter(Display):
    """A countable job: units done of all, speed and time left."""

    def __init__(self, description: str, total: float | None, unit: str, **how: Any) -> None:
        super().__init__(description, first_line=False, **how)
        self._total, self._unit = total, unit
        self._begun = self._clock()
        self.done = 0.0

    def advance(self, count: float = 1.0) -> None:
        """`count` more units are done."""
        self.update(self.done + count)

    def update(self, done: float, *, last: bool = False) -> None:
        """`done` units are done altogether; `last` writes the plain line at once."""
        self.done = done
        seconds = self._clock() - self._begun
        speed = f"  {count_text(done / seconds)} {self._unit}/s" if seconds > 0 and done > 0 else ""
        of = "" if self._total is None else f"/{count_text(self._total)}"
        left = duration_text(seconds) if self._total is None else self._pace.eta(done, self._total)
        self.show(f"{count_text(done)}{of} {self._unit}{speed}  {left}", done, self._total, last=last)


@contextmanager
def progress(
    description: str, total: float | None = None, *, unit: str = "items", **how: Any
) -> Iterator[ProgressCounter]:
    """Progress of any countable job on stderr; its last plain line always comes, unless the job failed.

    Args:
        description: Name of the job ("tokenise code").
        total: Units altogether; None when it is not known.
        unit: What is counted, plural.
        how: Further arguments of `Display`.

    Example:
        >>> with progress("tokenise code", total=3, unit="documents") as counter:
        ...     for _ in range(3):
        ...         counter.advance()
    """
    with ProgressCounter(description, total, unit, **how) as counter:
        yield counter
        counter.update(counter.done, last=True)

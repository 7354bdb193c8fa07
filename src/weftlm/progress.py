"""What a long job shows on stderr: a live bar on a terminal, a plain line now and then anywhere else.

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
from rich.text import Text

from weftlm.text import printable, printable_lines

Clock = Callable[[], float]
_SHOWN_WEIGHTS = 4


def count_text(count: float) -> str:
    """A count in three significant digits: 950, 31.0k, 1.24M, 3.00G; `-` where it is not finite."""
    if not math.isfinite(count):
        return "-"
    size = abs(count)
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= scale * 0.9995:
            digits = 2 if size < 9.995 * scale else 1 if size < 99.95 * scale else 0
            return f"{count / scale:.{digits}f}{suffix}"
    return f"{count:.0f}" if size >= 99.95 or float(count).is_integer() else f"{count:.1f}"


def duration_text(seconds: float) -> str:
    """A duration in its two largest units: 42s, 3m 20s, 2h 05m, 3d 04h; `-` where it is not finite."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d {hours % 24:02d}h"


def weights_text(weights: Mapping[str, float], top: int) -> str:
    """The `top` largest weights, largest first, ties by name: `code 0.41, prose 0.22, +7 more 0.37`."""
    order = sorted(weights, key=lambda name: (-weights[name], name))
    shown = [f"{name} {weights[name]:.2f}" for name in order[:top]]
    rest = order[top:]
    if rest:
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
        done: units done at the start, which is now; None: the start is the first report.
        clock: seconds, monotonic.
    """

    def __init__(self, done: float | None = None, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._start = None if done is None else (clock(), done)

    def eta(self, done: float, total: float) -> str:
        """`ETA 3m 20s`; `ETA -` while there is no pace yet."""
        now = self._clock()
        if self._start is None:
            self._start = (now, done)
        start_time, start_done = self._start
        left = math.nan
        if done >= total:
            left = 0.0
        elif done > start_done and now > start_time:
            left = (total - done) * (now - start_time) / (done - start_done)
        return f"ETA {duration_text(left)}"


class Display:
    """A long job on stderr: a bar on a terminal, elsewhere a plain line now and then. A context manager.

    Args:
        description: the job; the bar's label.
        enabled: False shows nothing (every rank but the first).
        log_every_seconds: pause between plain lines.
        first_line: whether the first one comes at once.
        stream: where to write; stderr when None.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        description: str = "train",
        *,
        enabled: bool = True,
        log_every_seconds: float = 10.0,
        first_line: bool = True,
        stream: TextIO | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._description = printable(description)
        self._enabled = enabled
        self._every_seconds = log_every_seconds
        self._clock = clock
        self._next_line = -math.inf if first_line else clock() + log_every_seconds
        self._bar: Progress | None = None
        if enabled and self._stream.isatty() and not (console := Console(file=self._stream)).is_dumb_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}", markup=False),
                console=console,
                expand=True,
                refresh_per_second=4,
                redirect_stdout=False,  # rich would move printed results onto stderr
            )
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
            status: in words; a second line of it goes below the bar's first.
            done: units done.
            total: units altogether; None when it is not known.
            last: whether to write the plain line at once.
        """
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, status=printable_lines(status))
        elif self._enabled and (last or self._clock() >= self._next_line):
            self._next_line = self._clock() + self._every_seconds
            write_line(f"{self._description} {status}".replace("\n", "  "), self._stream)

    def message(self, text: str) -> None:
        """Write a line above the bar (an evaluation's result, a checkpoint's path)."""
        if self._bar is not None:
            self._bar.console.print(Text(printable(text)))
        elif self._enabled:
            write_line(text, self._stream)


class TrainingDisplay(Display):
    """A training: steps, loss, tokens/s, time left and the largest mixture weights.

    Example:
        >>> with TrainingDisplay() as display:
        ...     display.update(10, 1000, 40960, 5.1, 31000.0, {"code": 0.7, "prose": 0.3})
    """

    _pace: Pace | None = None
    _weights: Mapping[str, float] = {}

    def update(
        self,
        step: int,
        total_steps: int,
        tokens: float,
        loss: float | None,
        tokens_per_second: float | None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Show the state after a step.

        Args:
            step: optimizer steps taken.
            total_steps: steps the run will take.
            tokens: training tokens seen.
            loss: recent training loss, nats per token.
            tokens_per_second: recent speed.
            weights: mixture weights by domain; None keeps the last ones.
        """
        self._pace = self._pace or Pace(clock=self._clock)
        self._weights = self._weights if weights is None else dict(weights)
        status = f"{step}/{total_steps}  {count_text(tokens)} tokens"
        if loss is not None:
            status += f"  loss {loss:.3f}"
        if tokens_per_second is not None:
            status += f"  {count_text(tokens_per_second)} tok/s"
        status += f"  {self._pace.eta(step, total_steps)}"
        if self._weights:
            status += f"\nmixture {weights_text(self._weights, _SHOWN_WEIGHTS)}"
        self.show(status, step, total_steps, last=step >= total_steps)


class ProgressCounter:
    """The handle `progress` yields: tell it what has been done."""

    def __init__(self, show: Callable[[float], None]) -> None:
        self._show = show
        self.done = 0.0

    def advance(self, count: float = 1.0) -> None:
        """`count` more units are done."""
        self.update(self.done + count)

    def update(self, done: float) -> None:
        """`done` units are done altogether."""
        self.done = done
        self._show(done)


@contextmanager
def progress(
    description: str,
    total: float | None = None,
    *,
    unit: str = "items",
    enabled: bool = True,
    log_every_seconds: float = 10.0,
    stream: TextIO | None = None,
    clock: Clock = time.monotonic,
) -> Iterator[ProgressCounter]:
    """Progress of any countable job on stderr; its last plain line always comes, unless the job failed.

    Args:
        description: the job ("tokenise code").
        total: units altogether; None when it is not known.
        unit: what is counted, plural.
        enabled, log_every_seconds, stream, clock: as `Display`.

    Example:
        >>> with progress("tokenise code", total=3, unit="documents") as counter:
        ...     for _ in range(3):
        ...         counter.advance()
    """
    pace, start = Pace(0.0, clock), clock()

    def show(done: float, last: bool = False) -> None:
        seconds = clock() - start
        speed = f"  {count_text(done / seconds)} {unit}/s" if seconds > 0 and done > 0 else ""
        of = "" if total is None else f"/{count_text(total)}"
        left = duration_text(seconds) if total is None else pace.eta(done, total)
        display.show(f"{count_text(done)}{of} {unit}{speed}  {left}", done, total, last=last)

    with Display(
        description, enabled=enabled, log_every_seconds=log_every_seconds, first_line=False, stream=stream, clock=clock
    ) as display:
        counter = ProgressCounter(show)
        yield counter
        show(counter.done, last=True)

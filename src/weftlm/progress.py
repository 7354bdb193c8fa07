"""What a long job shows on stderr: a live bar on a terminal, a plain line now and then anywhere else.

A root module, because preparing, training and evaluating all report progress. Nothing is ever written to stdout.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from weftlm.text import printable

Clock = Callable[[], float]


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


def _is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be redrawn in place: a real terminal, and not a dumb one."""
    return stream.isatty() and not Console(file=stream).is_dumb_terminal


def write_line(line: str, stream: TextIO | None = None) -> None:
    """Write one line on stderr, or on another stream; names in it may hold anything."""
    stream = sys.stderr if stream is None else stream
    stream.write(printable(line) + "\n")
    stream.flush()


class _Bar(Progress):
    """A rich progress bar with one free line of text under it."""

    footer: str = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.footer:
            yield Text(self.footer, style="dim", no_wrap=True, overflow="ellipsis")


def _bar(stream: TextIO) -> _Bar:
    return _Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}", markup=False),
        console=Console(file=stream),
        expand=True,
        refresh_per_second=4,
        redirect_stdout=False,  # rich would move printed results onto stderr
    )


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


class TrainingDisplay:
    """Training progress on stderr.

    On a terminal: a bar with steps, loss, tokens/s and time left, and the largest mixture weights under it. Elsewhere:
    the same in one plain line at the first and last step and at most every `log_every_seconds` between.

    Args:
        description: what is being trained; the bar's label.
        enabled: False shows nothing (every rank but the first).
        top_weights: how many mixture weights to name.
        log_every_seconds: pause between plain lines.
        stream: where to write; stderr when None.
        clock: seconds, monotonic.

    Example:
        >>> with TrainingDisplay() as display:
        ...     display.update(10, 1000, 40960, 5.1, 31000.0, {"code": 0.7, "prose": 0.3})
    """

    def __init__(
        self,
        description: str = "train",
        *,
        enabled: bool = True,
        top_weights: int = 4,
        log_every_seconds: float = 10.0,
        stream: TextIO | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.description = description
        self.enabled = enabled
        self.top_weights = top_weights
        self.log_every_seconds = log_every_seconds
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._pace = Pace(clock=clock)
        self._live = enabled and _is_terminal(self._stream)
        self._bar: _Bar | None = None
        self._task: TaskID | None = None
        self._weights: dict[str, float] = {}
        self._next_line = -math.inf

    def __enter__(self) -> TrainingDisplay:
        if self._live:
            self._bar = _bar(self._stream)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

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
        if not self.enabled:
            return
        if weights is not None:
            self._weights = dict(weights)
        status = f"{step}/{total_steps}  {count_text(tokens)} tokens"
        if loss is not None:
            status += f"  loss {loss:.3f}"
        if tokens_per_second is not None:
            status += f"  {count_text(tokens_per_second)} tok/s"
        status += f"  {self._pace.eta(step, total_steps)}"
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(
                    printable(self.description), total=total_steps, completed=step, status=status
                )
            if self._weights:
                self._bar.footer = printable("mixture: " + weights_text(self._weights, self.top_weights))
            self._bar.update(self._task, completed=step, total=total_steps, status=status)
            return
        now = self._clock()
        if now >= self._next_line or step >= total_steps:
            self._next_line = now + self.log_every_seconds
            mixture = f"  mixture {weights_text(self._weights, self.top_weights)}" if self._weights else ""
            write_line(f"{self.description} {status}{mixture}", self._stream)

    def message(self, text: str) -> None:
        """Write a line above the bar (an evaluation's result, a checkpoint's path)."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(Text(printable(text)))
        else:
            write_line(text, self._stream)


class ProgressCounter:
    """The handle `progress` yields: tell it what has been done."""

    def __init__(self, show: Callable[[float, bool], None]) -> None:
        self._show = show
        self.done = 0.0

    def advance(self, count: float = 1.0) -> None:
        """`count` more units are done."""
        self.done += count
        self._show(self.done, False)

    def update(self, done: float) -> None:
        """`done` units are done altogether."""
        self.done = done
        self._show(done, False)


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
    """Progress of any countable job on stderr: a bar on a terminal, a plain line now and then elsewhere.

    Args:
        description: what is being done ("tokenise code").
        total: units altogether; None when it is not known.
        unit: what is counted, plural.
        enabled: False shows nothing.
        log_every_seconds: pause between plain lines; the last one always comes, unless the job failed.
        stream: where to write; stderr when None.
        clock: seconds, monotonic.

    Example:
        >>> with progress("tokenise code", total=3, unit="documents") as counter:
        ...     for _ in range(3):
        ...         counter.advance()
    """
    stream = sys.stderr if stream is None else stream
    if not enabled:
        yield ProgressCounter(lambda done, last: None)
        return
    pace = Pace(0.0, clock)
    start = clock()

    def status(done: float) -> str:
        seconds = clock() - start
        speed = f"  {count_text(done / seconds)} {unit}/s" if seconds > 0 and done > 0 else ""
        if total is None:
            return f"{count_text(done)} {unit}{speed}  {duration_text(seconds)}"
        return f"{count_text(done)}/{count_text(total)} {unit}{speed}  {pace.eta(done, total)}"

    if _is_terminal(stream):
        bar = _bar(stream)
        if total is None:
            bar.columns = (SpinnerColumn(), *bar.columns)
        with bar:
            task = bar.add_task(printable(description), total=total, status=status(0.0))

            def redraw(done: float, last: bool) -> None:
                bar.update(task, completed=done, status=status(done))

            yield ProgressCounter(redraw)
        return

    next_line = start + log_every_seconds

    def line(done: float, last: bool) -> None:
        nonlocal next_line
        now = clock()
        if last or now >= next_line:
            next_line = now + log_every_seconds
            write_line(f"{description} {status(done)}", stream)

    counter = ProgressCounter(line)
    yield counter
    line(counter.done, True)

"""Progress on stderr: what is said, when, and where."""

import io
import math

import pytest

from weftlm.progress import TrainingDisplay, count_text, duration_text, progress, weights_text


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (7.25, "7.2"),
        (950, "950"),
        (999.4, "999"),
        (999.9, "1.00k"),
        (31_000, "31.0k"),
        (1_240_000, "1.24M"),
        (999_600, "1.00M"),
        (123_456_789, "123M"),
        (3e9, "3.00G"),
        (math.nan, "-"),
    ],
)
def test_counts_have_three_digits(count: float, text: str) -> None:
    assert count_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.6, "1m 00s"),
        (200, "3m 20s"),
        (7500, "2h 05m"),
        (273_600, "3d 04h"),
        (math.inf, "-"),
        (-1, "-"),
    ],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_weights_are_largest_first_and_the_rest_is_summed() -> None:
    weights = {"a": 0.1, "c": 0.3, "b": 0.3, "d": 0.2, "e": 0.1}
    assert weights_text(weights, 3) == "b 0.30, c 0.30, d 0.20, +2 more 0.20"
    assert weights_text({"a": 1.0}, 3) == "a 1.00"


def test_plain_lines_come_first_last_and_at_the_pace_asked_for() -> None:
    stream, clock = io.StringIO(), Clock()
    with TrainingDisplay(stream=stream, clock=clock, log_every_seconds=10.0) as display:
        for step in range(1, 101):
            display.update(step, 100, step * 4096, 5.0 - step / 100, 31_000.0, {"code": 0.75, "prose": 0.25})
            clock.now += 1.0
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/100" for step in range(1, 101, 10)] + ["100/100"]
    assert lines[1] == (
        "train 11/100  45.1k tokens  loss 4.890  31.0k tok/s  ETA 1m 29s  mixture code 0.75, prose 0.25"
    )
    assert lines[-1].endswith("ETA 0s  mixture code 0.75, prose 0.25")


def test_time_left_after_a_resume_counts_only_the_steps_of_this_process() -> None:
    stream, clock = io.StringIO(), Clock()
    with TrainingDisplay(stream=stream, clock=clock, log_every_seconds=0.0) as display:
        display.update(900, 1000, 0, None, None, {})
        clock.now += 20.0
        display.update(910, 1000, 0, None, None, {})
    assert stream.getvalue().splitlines()[-1].endswith("ETA 3m 00s")


def test_a_disabled_display_writes_nothing() -> None:
    stream = io.StringIO()
    with TrainingDisplay(stream=stream, enabled=False) as display:
        display.update(1, 1, 1, 1.0, 1.0, {"a": 1.0})
    with progress("p", 3, stream=stream, enabled=False) as counter:
        counter.advance()
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_and_names_are_not_markup(terminal: Terminal) -> None:
    with TrainingDisplay(stream=terminal) as display:
        display.update(5, 10, 40_960, 4.25, 31_000.0, {"[bold]odd[/bold]": 0.9, "b": 0.1})
    text = terminal.getvalue()
    assert "5/10" in text
    assert "loss 4.250" in text
    assert "31.0k tok/s" in text
    assert "[bold]odd[/bold] 0.90" in text


def test_printed_results_stay_on_stdout_while_a_bar_is_live(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainingDisplay(stream=terminal) as display:
        display.update(1, 2, 10, 1.0, 1.0, {})
        print("a result")
    assert capsys.readouterr().out == "a result\n"
    assert "a result" not in terminal.getvalue()


def test_a_dumb_terminal_gets_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with TrainingDisplay(stream=terminal) as display:
        display.update(1, 2, 10, 1.0, 1.0, {})
    assert terminal.getvalue() == "train 1/2  10 tokens  loss 1.000  1 tok/s  ETA -\n"


def test_progress_says_speed_and_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    with progress("tokenise", 100, unit="documents", stream=stream, clock=clock, log_every_seconds=4.0) as counter:
        for _ in range(10):
            clock.now += 1.0
            counter.advance(10)
    assert stream.getvalue().splitlines() == [
        "tokenise 40/100 documents  10 documents/s  ETA 6s",
        "tokenise 80/100 documents  10 documents/s  ETA 2s",
        "tokenise 100/100 documents  10 documents/s  ETA 0s",
    ]


def test_progress_without_a_total_counts_up() -> None:
    stream, clock = io.StringIO(), Clock()
    with progress("read", unit="MB", stream=stream, clock=clock) as counter:
        clock.now += 2.0
        counter.update(5000)
    assert stream.getvalue() == "read 5.00k MB  2.50k MB/s  2s\n"


def test_a_failed_job_does_not_say_it_is_done() -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError, match="broken"), progress("read", 3, stream=stream):
        raise RuntimeError("broken")
    assert stream.getvalue() == ""

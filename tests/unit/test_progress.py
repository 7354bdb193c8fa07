"""Progress on stderr: what is said, when, and where."""

import io
import math

import pytest

from weftlm.progress import ProgressBar, count_text, duration_text, weights_text


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
        (0, "0"), (7.25, "7.2"), (950, "950"), (999.4, "999"), (999.9, "1.00k"), (31_000, "31.0k"),
        (1_240_000, "1.24M"), (999_600, "1.00M"), (123_456_789, "123M"), (3e9, "3.00G"), (math.nan, "-"),
    ],
)  # fmt: skip
def test_counts_have_three_digits(count: float, text: str) -> None:
    assert count_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.3, "<1s"),
        (59.6, "1m 00s"), (200, "3m 20s"), (7500, "2h 05m"), (273_600, "3d 04h"), (math.inf, "-"), (-1, "-"),
    ],
)  # fmt: skip
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_weights_are_largest_first_and_the_rest_is_summed() -> None:
    weights = {"a": 0.1, "c": 0.3, "b": 0.3, "d": 0.2, "e": 0.1}
    assert weights_text(weights, 3) == "b 0.30, c 0.30, d 0.20, +2 more 0.20"


def test_plain_lines_come_at_a_pace_and_at_the_end_and_a_resumed_job_counts_its_own_steps() -> None:
    stream, clock = io.StringIO(), Clock()
    with ProgressBar("train", 930, unit="steps", done=900, stream=stream, clock=clock) as bar:
        for step in range(901, 931):
            clock.now += 1.0
            bar.update(step, f"loss {step}\x1b[2J")
    assert stream.getvalue().splitlines() == [
        r"train 910/930 steps  1 steps/s  ETA 20s  loss 910\x1b[2J",
        r"train 920/930 steps  1 steps/s  ETA 10s  loss 920\x1b[2J",
        r"train 930/930 steps  1 steps/s  ETA 0s  loss 930\x1b[2J",
        r"train 930/930 steps  1 steps/s  ETA 0s  loss 930\x1b[2J",
    ]


def test_without_a_total_it_counts_up() -> None:
    stream, clock = io.StringIO(), Clock()
    with ProgressBar("read", unit="MB", stream=stream, clock=clock) as bar:
        clock.now += 2.0
        bar.advance(5000)
    assert stream.getvalue() == "read 5.00k MB  2.50k MB/s  2s\n"


def test_a_disabled_display_and_a_failed_job_write_nothing() -> None:
    stream = io.StringIO()
    with ProgressBar("read", 3, stream=stream, enabled=False) as bar:
        bar.advance()
    with pytest.raises(RuntimeError, match="broken"), ProgressBar("read", 3, stream=stream):
        raise RuntimeError("broken")
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_names_are_not_markup_and_results_stay_on_stdout(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar("train", 10, unit="steps", stream=terminal) as bar:
        bar.update(5, "mixture [bold]odd[/bold] 0.90")
        print("a result")
    text = terminal.getvalue()
    assert "5/10 steps" in text
    assert "[bold]odd[/bold] 0.90" in text
    assert "a result" not in text
    assert capsys.readouterr().out == "a result\n"


def test_a_dumb_terminal_gets_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with ProgressBar("train", 2, unit="steps", stream=terminal, clock=Clock()) as bar:
        bar.update(1)
    assert terminal.getvalue() == "train 1/2 steps  ETA -\n"

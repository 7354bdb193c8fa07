"""Progress on stderr: what is said, when, and where."""

import io
import math
import sys
from collections.abc import Callable

import pytest

from weftlm import progress
from weftlm.progress import ProgressBar, count_text, duration_text, weights_text


class Clock:
    """A clock that moves when told, in place of the module `time`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


@pytest.mark.parametrize(
    ("write", "number", "text"),
    [
        (count_text, 0, "0"), (count_text, 7.25, "7.2"), (count_text, 999.4, "999"), (count_text, 999.9, "1.00k"),
        (count_text, 31_000, "31.0k"), (count_text, 999_600, "1.00M"), (count_text, 3e9, "3.00G"),
        (count_text, math.nan, "-"), (duration_text, 0, "0s"), (duration_text, 0.3, "<1s"),
        (duration_text, 59.6, "1m 00s"), (duration_text, 7500, "2h 05m"), (duration_text, 273_600, "3d 04h"),
        (duration_text, math.inf, "-"), (duration_text, -1, "-"),
    ],
)  # fmt: skip
def test_counts_have_three_digits_and_durations_two_units(
    write: Callable[[float], str], number: float, text: str
) -> None:
    assert write(number) == text


def test_weights_are_largest_first_and_the_rest_is_summed() -> None:
    weights = {"a": 0.1, "c": 0.3, "b": 0.3, "d": 0.2, "e": 0.1}
    assert weights_text(weights, 3) == "b 0.30, c 0.30, d 0.20, +2 more 0.20"


def test_plain_lines_come_at_a_pace_and_at_the_end_and_a_resumed_job_counts_its_own_steps(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar("train", 930, unit="steps", done=900) as bar:
        for step in range(901, 931):
            clock.now += 1.0
            bar.update(step, f"loss {step}\x1b[2J")
    assert capsys.readouterr().err.splitlines() == [
        r"train 910/930 steps  1 steps/s  ETA 20s  loss 910\x1b[2J",
        r"train 920/930 steps  1 steps/s  ETA 10s  loss 920\x1b[2J",
        r"train 930/930 steps  1 steps/s  ETA 0s  loss 930\x1b[2J",
        r"train 930/930 steps  1 steps/s  ETA 0s  loss 930\x1b[2J",
    ]


def test_without_a_total_it_counts_up(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("read", unit="MB") as bar:
        clock.now += 2.0
        bar.advance(5000)
    assert capsys.readouterr().err == "read 5.00k MB  2.50k MB/s  2s\n"


def test_a_disabled_display_and_a_failed_job_write_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("read", 3, enabled=False) as bar:
        bar.advance()
    with pytest.raises(RuntimeError, match="broken"), ProgressBar("read", 3):
        raise RuntimeError("broken")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["xterm-256color", "dumb"])
def test_a_terminal_gets_a_bar_names_are_not_markup_and_results_stay_on_stdout(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with ProgressBar("train", 10, unit="steps") as bar:
        bar.update(5, "mixture [bold]odd[/bold] 0.90")
        print("a result")
    text = terminal.getvalue()
    assert "5/10 steps" in text
    assert "[bold]odd[/bold] 0.90" in text
    assert ("\x1b" in text) == (kind != "dumb")
    assert "a result" not in text
    assert capsys.readouterr().out == "a result\n"

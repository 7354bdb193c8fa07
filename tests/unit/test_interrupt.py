"""Ctrl-C and SIGTERM: stop at a safe point, say how to go on; twice, end at once."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
from support.faults import stopped

from weftlm import interrupt
from weftlm.interrupt import Stopped, handled, how_to_go_on, point, safe_points

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@BOTH
def test_outside_of_safe_points_a_signal_stops_at_once(number: signal.Signals) -> None:
    begun = time.monotonic()

    def work() -> None:
        os.kill(os.getpid(), number)
        time.sleep(30)

    assert stopped(work).code == 128 + number
    assert time.monotonic() - begun < 20


@BOTH
def test_inside_it_waits_for_the_next_point_which_keeps_the_state(number: signal.Signals) -> None:
    steps: list[int] = []
    kept: list[int] = []

    def work() -> None:
        with safe_points():
            for step in range(5):
                if step == 2:
                    os.kill(os.getpid(), number)
                steps.append(step)
                point(lambda: kept.extend(steps))

    assert stopped(work).code == 128 + number
    assert kept == [0, 1, 2]
    assert not interrupt.asked()


def test_the_end_of_the_outermost_safe_points_is_a_point() -> None:
    reached: list[bool] = []

    def work() -> None:
        with safe_points():
            with safe_points():
                os.kill(os.getpid(), signal.SIGINT)
            reached.append(True)
        reached.append(False)

    stopped(work)
    assert reached == [True]


def test_a_second_signal_ends_the_process_on_the_spot() -> None:
    child = os.fork()
    if child == 0:
        with handled(), safe_points():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("typed", "again"),
    [
        (["train", "recipe.yaml"], "run the command again to go on"),
        (["run", "r.yaml", "--from=experts"], "run the command again without --from to go on"),
    ],
)
def test_the_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch, typed: list[str], again: str) -> None:
    monkeypatch.setattr(sys, "argv", ["weftlm", *typed])
    with handled():
        interrupt.done_with("--from", "--overwrite")
        said = how_to_go_on(Stopped(signal.SIGINT))
    assert said == f"weftlm: stopped by SIGINT; what is finished is kept: {again}"

"""The number of threads follows the load of the machine, unless it was asked for."""

from __future__ import annotations

import pytest
import torch

from weftlm import threads
from weftlm.threads import ThreadCount, usable_cores


class Machine:
    """A machine on which other processes use `others` cores, and its clock."""

    def __init__(self) -> None:
        self.others, self.now, self.changes = 0.0, 0.0, list[int]()

    def monotonic(self) -> float:
        return self.now

    def run(self, count: ThreadCount, seconds: int) -> None:
        for _ in range(seconds * 10):
            self.now += 0.1
            count.look()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setattr(threads, "time", found)
    monkeypatch.setattr(threads, "busy_elsewhere", lambda: found.others)
    monkeypatch.setattr(torch, "set_num_threads", found.changes.append)
    return found


@pytest.mark.parametrize(
    ("cores", "others", "threads"),
    [(2, 0.0, 2), (2, 0.3, 2), (2, 0.7, 1), (2, 1.9, 1), (16, 1.0, 15), (16, 15.0, 8), (1, 0.9, 1)],
)
def test_the_cores_that_others_leave_are_used(cores: int, others: float, threads: int, machine: Machine) -> None:
    count, machine.others = ThreadCount(cores), others
    machine.run(count, 4)
    assert count.threads == threads
    assert machine.changes == ([] if threads == cores else [threads])


def test_the_number_returns_when_the_machine_is_free_again(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    count = ThreadCount(2)
    caplog.set_level("INFO", logger="weftlm")
    for others in (0.0, 1.0, 0.0):
        machine.others = others
        machine.run(count, 5)
    assert machine.changes == [1, 2]
    assert ["1 threads instead of 2" in caplog.messages[0], "2 threads instead of 1" in caplog.messages[1]] == [
        True
    ] * 2


def test_one_busy_second_changes_nothing(machine: Machine) -> None:
    count = ThreadCount(2)
    for machine.others in (0.0, 1.0, 0.0, 1.0, 0.0):
        machine.now += 1.0
        count.look()
    assert machine.changes == []


def test_a_quota_of_a_container_bounds_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, most in (("150000 100000", 1), ("max 100000", 10**6), ("50000 100000", 1)):
        monkeypatch.setattr(threads.Path, "read_text", lambda *_, text=text, **__: text)
        assert 1 <= usable_cores() <= most


@pytest.mark.parametrize(("variable", "changed", "follows"), [(None, 0, True), ("1", 0, False), (None, 1, False)])
def test_a_number_that_was_asked_for_is_kept(
    variable: str | None, changed: int, follows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    for name, value in {
        "_decided": False, "_count": None, "_default": torch.get_num_threads() + changed,
        "start_following": started.append,
    }.items():  # fmt: skip
        monkeypatch.setattr(threads, name, value)
    threads.follow_load()
    assert bool(started) == follows

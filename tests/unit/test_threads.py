"""The number of threads follows the load of the machine, unless it was asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from weftlm import threads
from weftlm.threads import ThreadCount, usable_cores


class Machine:
    """A machine on which other processes use `others` cores, and its clock."""

    def __init__(self, cores: int) -> None:
        self.others, self.now, self.changes = 0.0, 0.0, list[int]()
        self.count = ThreadCount(cores, self.changes.append, lambda: self.others, lambda: self.now)

    def run(self, seconds: int) -> None:
        for _ in range(seconds * 10):
            self.now += 0.1
            self.count.look()


@pytest.mark.parametrize(
    ("cores", "others", "threads"),
    [(2, 0.0, 2), (2, 0.3, 2), (2, 0.7, 1), (2, 1.9, 1), (16, 1.0, 15), (16, 15.0, 8), (1, 0.9, 1)],
)
def test_the_cores_that_others_leave_are_used(cores: int, others: float, threads: int) -> None:
    machine = Machine(cores)
    machine.others = others
    machine.run(4)
    assert machine.count.threads == threads
    assert machine.changes == ([] if threads == cores else [threads])


def test_the_number_returns_when_the_machine_is_free_again(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(2)
    caplog.set_level("INFO", logger="weftlm")
    for others in (0.0, 1.0, 0.0):
        machine.others = others
        machine.run(5)
    assert machine.changes == [1, 2]
    assert ["1 threads instead of 2" in caplog.messages[0], "2 threads instead of 1" in caplog.messages[1]] == [
        True
    ] * 2


def test_one_busy_second_changes_nothing() -> None:
    machine = Machine(2)
    for machine.others in (0.0, 1.0, 0.0, 1.0, 0.0):
        machine.now += 1.0
        machine.count.look()
    assert machine.changes == []


def test_a_quota_of_a_container_bounds_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, most in (("150000 100000", 1), ("max 100000", 10**6), ("50000 100000", 1)):
        monkeypatch.setattr(threads.Path, "read_text", lambda *_, text=text, **__: text)
        assert 1 <= usable_cores() <= most


@pytest.mark.parametrize(
    ("environment", "before", "follows"),
    [({}, "", True), ({"OMP_NUM_THREADS": "1"}, "", False), ({}, "torch.set_num_threads(3)", False)],
)
def test_a_number_that_was_asked_for_is_kept(environment: dict[str, str], before: str, follows: bool) -> None:
    code = (
        f"import os; os.environ.pop('OMP_NUM_THREADS', None); os.environ.update({environment!r})\n"
        "import torch\nfrom weftlm import threads\n"
        f"{before}\nthreads.follow_load()\nprint(threads._count is not None)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == [str(follows)]

"""metrics.jsonl is rewound to the checkpoint and survives a torn last line."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from weftlm.errors import CheckpointError, DataError
from weftlm.training.metrics import MetricsLog, check_metrics, read_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_resume_drops_later_and_torn_lines_and_a_fresh_run_all(path: Path) -> None:
    first = MetricsLog(path)
    for step in (10, 20, 30):
        first.write("train", step, step * 100, loss=1.0 / step)
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    MetricsLog(path, resume_step=20).write("train", 30, 3000, loss=0.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(10, 0.1), (20, 0.05), (30, 0.5)]
    MetricsLog(path)
    assert path.read_text() == ""


@pytest.mark.parametrize("broken", ['{"kind": "train"}', "[]", '{"kind": 1, "step": 2}', "\x00", "[" * 9999])
def test_a_broken_line_is_named_and_a_torn_last_one_passed_over(path: Path, broken: str) -> None:
    whole = '{"kind": "train", "step": 1, "tokens": 2}\n'
    path.write_text(whole + broken)
    assert [line["step"] for line in read_metrics(path)] == [1]
    path.write_text(whole + broken + "\n" + whole)
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2, is not what was written"):
        list(read_metrics(path))


def test_a_changed_digit_is_noticed_and_what_came_later_is_not(path: Path) -> None:
    log = MetricsLog(path)
    log.write("train", 1, 100, loss=2.5)
    stated = log.flush()
    log.write("train", 2, 200, loss=2.25)
    check_metrics(path, stated)
    text = path.read_text()
    path.write_text(text.replace("2.25", "2.75"))
    check_metrics(path, stated)
    for altered in (text.replace("2.5", "2.4"), text[:10]):
        path.write_text(altered)
        with pytest.raises(CheckpointError, match=r"metrics.jsonl was altered since the checkpoint.*delete it"):
            check_metrics(path, stated)


def test_numbers_reach_the_trackers_and_those_that_are_not_finite_become_null(path: Path) -> None:
    tracker = Mock()
    log = MetricsLog(path, trackers=(tracker,))
    log.write("eval", 3, 7, sets={"a": {"x": 1.5, "none": None}}, flag=True, weights=float("nan"), l=[float("inf"), 1])
    log.close()
    tracker.log.assert_called_once_with({"eval/tokens": 7.0, "eval/sets/a/x": 1.5}, step=3)
    tracker.finish.assert_called_once_with()
    line = next(read_metrics(path))
    assert (line["weights"], line["l"]) == (None, [None, 1])


def test_a_full_disk_is_a_clear_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(path)

    def full(line: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weftlm.training.metrics.json.dumps", full)
    with pytest.raises(CheckpointError, match=r"cannot be written: the disk is full.*the same command goes on"):
        log.write("train", 1, 1)

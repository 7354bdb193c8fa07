"""metrics.jsonl is rewound to the checkpoint and survives a torn last line."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from weftlm.errors import CheckpointError, DataError
from weftlm.training.metrics import MetricsLog, check_metrics, flatten, read_metrics


def test_resume_drops_later_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(path)
    for step in (10, 20, 30):
        first.write("train", step, step * 100, loss=1.0 / step)
    first.close()
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    second = MetricsLog(path, resume_step=20)
    second.write("train", 30, 3000, loss=0.5)
    second.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[0]["loss"] == 0.1
    assert lines[2]["loss"] == 0.5


@pytest.mark.parametrize("broken", ['{"kind": "train"}', "[]", '{"kind": 1, "step": 2}', "\x00", "[" * 9999])
def test_a_broken_line_is_named_and_a_torn_last_one_passed_over(tmp_path: Path, broken: str) -> None:
    path, whole = tmp_path / "metrics.jsonl", '{"kind": "train", "step": 1, "tokens": 2}\n'
    path.write_text(whole + broken)
    assert [line["step"] for line in read_metrics(path)] == [1]
    path.write_text(whole + broken + "\n" + whole)
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2, is not what was written"):
        list(read_metrics(path))


def test_a_changed_digit_is_noticed_and_what_came_later_is_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("train", 1, 100, loss=2.5)
    stated = log.flush()
    log.write("train", 2, 200, loss=2.25)
    log.close()
    check_metrics(path, stated)
    text = path.read_text()
    path.write_text(text.replace("2.25", "2.75"))
    check_metrics(path, stated)
    for altered in (text.replace("2.5", "2.4"), text[:10]):
        path.write_text(altered)
        with pytest.raises(CheckpointError, match=r"metrics.jsonl was altered since the checkpoint.*delete it"):
            check_metrics(path, stated)
    path.unlink()
    check_metrics(path, stated)


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 0, "tokens": 0}\n')
    MetricsLog(path).close()
    assert path.read_text() == ""


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("mixture", 1, 1, weights={"a": float("nan")}, listed=[float("inf"), 1.0])
    log.close()
    line = next(read_metrics(path))
    assert line["weights"] == {"a": None}
    assert line["listed"] == [None, 1.0]


def test_trackers_get_every_number(tmp_path: Path) -> None:
    tracker = Mock()
    log = MetricsLog(tmp_path / "a.jsonl", trackers=(tracker,))
    log.write("train", 1, 1, loss=2.0)
    log.close()
    tracker.log.assert_called_once_with({"train/tokens": 1.0, "train/loss": 2.0}, step=1)
    tracker.finish.assert_called_once_with()


def test_a_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")

    def full(line: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weftlm.training.metrics.json.dumps", full)
    with pytest.raises(CheckpointError, match=r"cannot be written: the disk is full.*the same command goes on"):
        log.write("train", 1, 1)
    log.close()


def test_flatten_names_every_number() -> None:
    line = {"kind": "eval", "step": 3, "tokens": 7, "sets": {"a": {"x": 1.5, "none": None}}, "flag": True}
    assert dict(flatten(line)) == {"eval/tokens": 7.0, "eval/sets/a/x": 1.5}

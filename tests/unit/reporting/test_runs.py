"""Reading run folders: whole, running, torn, broken."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from weftlm.errors import DataError
from weftlm.reporting.runs import flatten, number, read_runs


def test_a_finished_run_is_read_whole(three_runs: list[Path]) -> None:
    run = read_runs(three_runs)[2]
    result = json.loads((three_runs[2] / "result.json").read_text())
    assert run.finished
    assert run.problems == ()
    assert (run.label, run.policy, run.steps, run.train_tokens) == ("dga", "dga", 800, 800 * 4096)
    assert run.parameters == 1_245_312
    assert run.weights == result["weights"]
    assert run.epochs == result["epochs"]
    assert run.seconds == result["seconds"]
    assert run.final is not None
    assert run.final.target.bits_per_byte == result["sets"]["target"]["bits_per_byte"]
    assert run.final.generic.bits_per_byte == result["generic"]["bits_per_byte"]
    assert run.final.generic.bits_per_byte_se == result["generic"]["bits_per_byte_se"]
    assert list(run.final.domains) == run.domains == list(result["weights"])
    assert len(run.evaluations) == 17
    assert set(run.windows) == set(result["sets"])


def test_series_follow_the_records_and_null_is_a_gap(three_runs: list[Path]) -> None:
    run = read_runs(three_runs)[2]
    records = [json.loads(line) for line in (three_runs[2] / "metrics.jsonl").read_text().splitlines()]
    mixture = [record for record in records if record["kind"] == "mixture"]
    x_N, y_N = run.domain_series("weights", "json")
    assert x_N.tolist() == [record["tokens"] for record in mixture]
    assert y_N.tolist() == [record["weights"]["json"] for record in mixture]
    assert np.isnan(run.domain_series("alignment", "licences")[1]).all()
    assert run.series("train", "loss")[1][0] == next(r["loss"] for r in records if r["kind"] == "train")


def test_a_running_run_shows_its_latest_and_a_torn_line_is_said(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folder = make_run(tmp_path / "run", "dga", stop=130)
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"kind":"train","step":140,"tok')
    run = read_runs([folder])[0]
    assert not run.finished
    assert run.steps == 130
    assert run.final is not None
    assert run.final.step == 100
    assert len(run.problems) == 2
    assert any("it has not finished" in problem for problem in run.problems)
    assert any("last line of metrics.jsonl is incomplete" in problem for problem in run.problems)


def test_broken_lines_inside_are_counted(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folder = make_run(tmp_path / "run", "uniform", stop=100)
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([lines[0], b"\xff\xfe garbage\n", b"[1, 2]\n", b"\n", *lines[1:]]))
    run = read_runs([folder])[0]
    assert "2 lines are not readable in metrics.jsonl (2, 3): left out." in run.problems
    assert len(run.train) == 10


def test_a_step_written_twice_counts_once_the_later(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folder = make_run(tmp_path / "run", "uniform", stop=100)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": 50, "tokens": 204_800, "loss": 1.25}) + "\n")
    run = read_runs([folder])[0]
    assert [record["step"] for record in run.train] == list(range(10, 101, 10))
    assert run.series("train", "loss")[1][4] == 1.25


def test_an_empty_folder_is_described_not_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = read_runs([tmp_path / "run"])[0]
    assert run.final is None
    assert run.domains == []
    assert len(run.problems) == 4
    assert run.label == "run"


@pytest.mark.parametrize("name", ["result.json", "run.json", "recipe.yaml", "metrics.jsonl", "windows.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b"[]", b"{", b"null", b"[" * 400])
def test_any_file_may_be_garbage(tmp_path: Path, make_run: Callable[..., Path], name: str, content: bytes) -> None:
    folder = make_run(tmp_path / "run", "dga", ["a", "b"])
    (folder / name).write_bytes(content)
    run = read_runs([folder])[0]
    if (name, content) != ("metrics.jsonl", b""):
        assert any(name in problem for problem in run.problems)
    assert run.final is not None


def test_json_nested_beyond_reason_is_garbage_too(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folder = make_run(tmp_path / "run", "dga", ["a", "b"])
    (folder / "result.json").write_text("[" * 100_000)
    said = "result.json cannot be read (its values are nested too deep); it is left out."
    assert said in read_runs([folder])[0].problems


def test_values_of_the_wrong_kind_are_missing_values(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folder = make_run(tmp_path / "run", "dga", ["a", "b"])
    wrong = {
        "policy": 3,
        "steps": "x",
        "sets": {"target": [1], "a": {"bits_per_byte": True}},
        "weights": 5,
        "seconds": [],
    }
    (folder / "result.json").write_text(json.dumps(wrong))
    run = read_runs([folder])[0]
    assert run.policy == ""
    assert run.final is not None
    assert math.isnan(run.final.target.bits_per_byte)
    assert math.isnan(run.final.domains["a"].bits_per_byte)
    assert run.steps == 800


def test_labels_are_policies_else_folders_else_numbers(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    a = make_run(tmp_path / "one" / "seed-0", "dga", ["a"], stop=20)
    b = make_run(tmp_path / "one" / "seed-1", "dga", ["a"], stop=20)
    c = make_run(tmp_path / "two" / "seed-0", "uniform", ["a"], stop=20)
    assert [run.label for run in read_runs([a, c])] == ["dga", "uniform"]
    assert [run.label for run in read_runs([a, b])] == ["seed-0", "seed-1"]
    assert [run.label for run in read_runs([a, b, c])] == ["1 seed-0", "2 seed-1", "3 seed-0"]


def test_a_path_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a run folder"):
        read_runs([tmp_path / "missing"])


def test_small_helpers() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
    assert number(3) == 3.0
    assert all(math.isnan(number(value)) for value in (None, True, "3", [], 10**400))

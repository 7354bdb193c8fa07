"""Reading run folders: whole, running, torn, broken."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from weftlm.errors import DataError
from weftlm.reporting.runs import GENERIC, number, read_runs

MakeRun = Callable[..., Path]
FILES = ("result.json", "run.json", "recipe.yaml", "metrics.jsonl", "windows.safetensors")


def test_a_finished_run_is_read_whole(three_runs: list[Path]) -> None:
    run = read_runs(three_runs)[2]
    result = json.loads((three_runs[2] / "result.json").read_text())
    assert (run.finished, run.problems) == (True, [])
    assert (run.label, run.policy, run.steps, run.train_tokens) == ("dga", "dga", 800, 800 * 4096)
    assert (run.latest("weights"), run.latest("epochs")) == (result["weights"], result["epochs"])
    assert run.score("target").value == result["sets"]["target"]["bits_per_byte"]
    assert run.score(GENERIC) == (result["generic"]["bits_per_byte"], result["generic"]["bits_per_byte_se"])
    assert run.scored_domains == run.domains == list(result["weights"])
    assert (len(run.evaluations), set(run.windows)) == (9, set(result["sets"]))
    records = [json.loads(line) for line in (three_runs[2] / "metrics.jsonl").read_text().splitlines()]
    mixture = [record for record in records if record["kind"] == "mixture"]
    x_N, y_N = run.series("mixture", "weights", "json")
    assert x_N.tolist() == [record["tokens"] for record in mixture]
    assert y_N.tolist() == [record["weights"]["json"] for record in mixture]
    assert np.isnan(run.series("mixture", "alignment", "licences")[1]).all(), "null is a gap"


def test_a_running_run_shows_its_latest_and_broken_lines_are_counted(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path / "run", "dga", ["a"], stop=140)
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    again = json.dumps({"kind": "train", "step": 40, "tokens": 163_840, "loss": 1.25}).encode() + b"\n"
    torn = [lines[0], b"\xff\xfe garbage\n", b"[1, 2]\n", b"\n", *lines[1:], again, b'{"kind":"train","step":140,"tok']
    metrics.write_bytes(b"".join(torn))
    run = read_runs([folder])[0]
    assert not run.finished
    assert (run.steps, run.final.step, len(run.train)) == (140, 100, 7)
    assert run.train[1]["loss"] == 1.25, "of a step written twice the later counts"
    assert any("it has not finished" in problem for problem in run.problems)
    assert f"3 of {len(lines) + 4} lines of metrics.jsonl cannot be read and are left out." in run.problems


def test_an_empty_folder_is_described_not_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = read_runs([tmp_path / "run"])[0]
    assert (run.label, run.domains, len(run.problems)) == ("run", [], 4)
    assert math.isnan(run.score("target").value)
    with pytest.raises(DataError, match="is not a run folder"):
        read_runs([tmp_path / "missing"])


def test_any_file_may_be_garbage_and_any_value_of_the_wrong_kind(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path / "run", "dga", ["a", "b"])
    for name in FILES:
        whole = (folder / name).read_bytes()
        for content in (b"", b"\x00\xff\xfe", b"[]", b"{", b"null", b"[" * 100_000):
            (folder / name).write_bytes(content)
            run = read_runs([folder])[0]
            assert run.evaluations
            if (name, content) != ("metrics.jsonl", b""):
                assert any(name in problem for problem in run.problems), (name, content[:9])
        (folder / name).write_bytes(whole)
    sets = {"target": [1], "a": {"bits_per_byte": True}}
    wrong = {"policy": 3, "steps": "x", "sets": sets, "weights": 5, "seconds": []}
    (folder / "result.json").write_text(json.dumps(wrong))
    run = read_runs([folder])[0]
    assert (run.policy, run.steps) == ("", 800)
    assert math.isnan(run.score("target").value)
    assert math.isnan(run.score("a").value)
    others: list[object] = [None, True, "3", [], 10**400]
    assert all(math.isnan(number(value)) for value in others)


def test_labels_are_policies_else_folders_else_numbers(tmp_path: Path, make_run: MakeRun) -> None:
    a, b, c = (
        make_run(tmp_path / folder, policy, ["a"], stop=20)
        for folder, policy in (("one/seed-0", "dga"), ("one/seed-1", "dga"), ("two/seed-0", "uniform"))
    )
    assert [run.label for run in read_runs([a, c])] == ["dga", "uniform"]
    assert [run.label for run in read_runs([a, b])] == ["seed-0", "seed-1"]
    assert [run.label for run in read_runs([a, b, c])] == ["1 seed-0", "2 seed-1", "3 seed-0"]

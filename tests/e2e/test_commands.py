"""The real command line, from corpora to report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import Call
from support.tiny_project import WORDS

Write = Callable[..., Path]

SETS = {"target", *WORDS}
SHORT = ["--set", "training.steps=4", "--set", "evaluation.every_steps=null"]


def test_from_corpora_to_report(tmp_path: Path, recipe: Write, call: Call) -> None:
    path = recipe()
    described = call("train", path, "--dry-run", "--json", "--set", "training.lr=0.5")
    assert described["recipe"]["training"]["lr"] == 0.5
    assert described["recipe"]["mixture"]["eta"] > 0, "defaults are spelled out"
    assert described["plan"]["tokens"] == 60 * 8 * 32
    assert not (tmp_path / "runs").exists(), "nothing is done"
    prepared = call("prepare", path, "--json")
    assert set(prepared["sets"]) == SETS
    assert all(facts["train_tokens"] > 0 for facts in prepared["sets"].values())
    assert {fact["name"] for fact in call("domains", path, "--json")} == set(WORDS)

    result = call("train", path, "--json")
    assert result["steps"] == 60
    assert result["train_tokens"] == 60 * 8 * 32
    assert set(result["sets"]) == SETS
    assert math.isclose(sum(result["weights"].values()), 1.0, abs_tol=1e-9)
    lines = [json.loads(line) for line in (tmp_path / "runs/one/metrics.jsonl").read_text().splitlines()]
    losses = [line["sets"]["target"]["nats_per_token"] for line in lines if line["kind"] == "eval"]
    assert losses[-1] < losses[0] - 0.5, "training did not reduce the target's loss"
    assert result["weights"]["sailing"] > 0.5, f"the target speaks of sailing: {result['weights']}"

    assert call("train", path, "--json") == result, "a finished run is not trained again"
    measured = call("eval", path, "--json", "--max-tokens", "0")
    assert measured["sets"]["target"]["nats_per_token"] == pytest.approx(
        result["sets"]["target"]["nats_per_token"], rel=1e-5
    )
    page = Path(call("report", path, "--json")["report"])
    assert "<html" in (tmp_path / page).read_text()[:500].lower()


def test_a_run_says_how_it_was_made_and_is_not_continued_by_another(tmp_path: Path, recipe: Write, call: Call) -> None:
    path = recipe()
    call("train", path, *SHORT)
    run = tmp_path / "runs/one"
    described = json.loads((run / "run.json").read_text())
    assert described["seed"] == 3
    assert "torch" in described["packages"]
    assert described["fingerprints"]["data"]
    assert {choice["setting"] for choice in described["runtime"]} >= {"device", "precision", "compile", "threads"}
    # The resolved recipe is itself a recipe, and the same one.
    result = json.loads((run / "result.json").read_text())
    assert call("train", run / "recipe.yaml", "--json")["identity"] == result["identity"]
    assert (run / "model" / "model.safetensors").exists()
    assert (run / "model" / "tokenizer.json").exists()
    said = call("train", path, *SHORT, "--set", "training.lr=0.1", code=1)
    assert "a run of something else (training.lr: 0.003 before, 0.1 now)" in said


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"model": {"architecture": "llama", "config": {"hiden_size": 3}}}, 2, "did you mean 'hidden_size'"),
        (
            {"data": {"corpora": [{"path": "corpora/absent.jsonl"}]}, "mixture": {"policy": "uniform"}},
            1,
            "absent.jsonl",
        ),
        ({"run": "/proc/nowhere/run"}, 1, "/proc/nowhere"),
    ],
)
def test_a_mistake_is_one_clear_line_and_an_exit_code(
    recipe: Write, call: Call, changes: dict[str, object], code: int, message: str
) -> None:
    said = call("train", recipe(changes), code=code)
    assert message in said
    assert "Traceback" not in said


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(tmp_path: Path, recipe: Write, call: Call) -> None:
    said = call(
        "train", recipe(), *SHORT, "--set", "training.lr=1e30", "--set", "training.warmup_steps=0",
        "--set", "training.clip_norm=null", "--set", "training.save_every_steps=1", "--set", "mixture.policy=uniform",
        code=1,
    )  # fmt: skip
    assert "nothing was applied" in said
    assert "step-0000000" in said
    assert any((tmp_path / "runs/one/checkpoints").glob("step-*"))


def test_a_torn_checkpoint_is_passed_over(
    tmp_path: Path, recipe: Write, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    path = recipe()
    changes = [*SHORT, "--set", "training.save_every_steps=2"]
    call("train", path, *changes)
    run = tmp_path / "runs/one"
    expected = (run / "model/model.safetensors").read_bytes()
    (run / "result.json").unlink()
    newest = max((run / "checkpoints").glob("step-*"))
    state = newest / "tensors.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    call("train", path, *changes)
    assert "trying the checkpoint before it" in caplog.text
    assert newest.name in caplog.text
    assert (run / "model/model.safetensors").read_bytes() == expected

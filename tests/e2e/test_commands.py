"""The real command line, from corpora to report."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import Call
from support.tiny_project import WORDS

Weftlm = Callable[..., subprocess.CompletedProcess[str]]
Write = Callable[..., Path]

SETS = {"target", *WORDS}


def test_from_corpora_to_report(tmp_path: Path, recipe: Write, weftlm: Weftlm, call: Call) -> None:
    path = recipe()
    prepared = json.loads(weftlm("prepare", path, "--json").stdout)
    assert set(prepared["sets"]) == SETS
    assert all(facts["train_tokens"] > 0 for facts in prepared["sets"].values())

    facts = call("domains", path, "--json")
    assert {fact["name"] for fact in facts} == set(WORDS)

    result = json.loads(weftlm("train", path, "--json").stdout)
    assert result["steps"] == 60
    assert result["train_tokens"] == 60 * 8 * 32
    assert set(result["sets"]) == SETS
    assert math.isclose(sum(result["weights"].values()), 1.0, abs_tol=1e-9)
    first, last = eval_lines(tmp_path / "runs/one")
    assert last < first - 0.5, "training did not reduce the target's loss"
    assert result["weights"]["sailing"] > 0.5, f"the target speaks of sailing: {result['weights']}"

    again = call("train", path, "--json")
    assert again == result, "a finished run is not trained again"

    measured = call("eval", path, "--json", "--max-tokens", "0")
    assert measured["sets"]["target"]["nats_per_token"] == pytest.approx(
        result["sets"]["target"]["nats_per_token"], rel=1e-5
    )

    page = Path(call("report", path, "--json")["report"])
    assert "<html" in (tmp_path / page).read_text()[:500].lower()


def eval_lines(run: Path) -> tuple[float, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["sets"]["target"]["nats_per_token"] for line in lines if line["kind"] == "eval"]
    return losses[0], losses[-1]


def test_the_run_folder_says_how_it_was_made(tmp_path: Path, recipe: Write, weftlm: Weftlm, call: Call) -> None:
    path = recipe()
    weftlm("train", path, "--set", "training.steps=4", "--set", "evaluation.every_steps=null")
    run = tmp_path / "runs/one"
    described = json.loads((run / "run.json").read_text())
    assert described["seed"] == 3
    assert "torch" in described["packages"]
    assert described["fingerprints"]["data"]
    assert {choice["setting"] for choice in described["runtime"]} >= {"device", "precision", "compile", "threads"}
    # The resolved recipe is itself a recipe, and the same one.
    result = json.loads((run / "result.json").read_text())
    again = call("train", run / "recipe.yaml", "--json")
    assert again["identity"] == result["identity"]
    assert (run / "model" / "model.safetensors").exists()
    assert (run / "model" / "tokenizer.json").exists()


def test_dry_run_shows_the_resolved_recipe_and_does_nothing(tmp_path: Path, recipe: Write, call: Call) -> None:
    path = recipe()
    described = call("train", path, "--dry-run", "--json", "--set", "training.lr=0.5")
    assert described["recipe"]["training"]["lr"] == 0.5
    assert described["recipe"]["mixture"]["eta"] > 0, "defaults are spelled out"
    assert described["plan"]["tokens"] == 60 * 8 * 32
    assert described["plan"]["parameters"] > 1000
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"mixture": {"policy": "dgaa"}}, 2, "did you mean 'dga'"),
        ({"mixture": {"policy": "dga", "etta": 1}}, 2, "did you mean 'eta'"),
        ({"modle": {}}, 2, "modle: unknown key; did you mean 'model'"),
        ({"model": {"architecture": "llama", "config": {"hiden_size": 3}}}, 2, "did you mean 'hidden_size'"),
        (
            {"data": {"corpora": [{"path": "corpora/absent.jsonl"}]}, "mixture": {"policy": "uniform"}},
            1,
            "absent.jsonl",
        ),
        ({"data": {"corpora": [{"path": "corpora/algebra.jsonl", "label": "a"}]}}, 2, "give data.target"),
        ({"run": "/proc/nowhere/run"}, 1, "/proc/nowhere"),
    ],
)
def test_a_mistake_is_one_clear_line_and_an_exit_code(
    recipe: Write, call: Call, changes: dict[str, object], code: int, message: str
) -> None:
    said = call("train", recipe(changes), code=code)
    assert message in said
    assert "Traceback" not in said


def test_usage_mistakes_exit_with_2(weftlm: Weftlm, call: Call) -> None:
    finished = weftlm("trian", check=2)
    assert "Did you mean 'train'" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert "No such option" in call("train", "--nope", code=2)
    assert "cannot be read" in call("train", "absent.yaml", code=2)


def test_another_recipe_does_not_continue_a_run(recipe: Write, call: Call) -> None:
    path = recipe()
    call("train", path, "--set", "training.steps=4")
    said = call("train", path, "--set", "training.steps=4", "--set", "training.lr=0.1", code=1)
    assert "a run of something else (training.lr: 0.003 before, 0.1 now)" in said


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(
    tmp_path: Path, recipe: Write, weftlm: Weftlm
) -> None:
    path = recipe()
    finished = weftlm(
        "train", path, "--set", "training.lr=1e30", "--set", "training.warmup_steps=0",
        "--set", "training.clip_norm=null", "--set", "training.save_every_steps=1",
        "--set", "mixture.policy=uniform", "--set", "evaluation.every_steps=null",
        check=1,
    )  # fmt: skip
    assert "nothing was applied" in finished.stderr
    assert "step-0000000" in finished.stderr
    assert any((tmp_path / "runs/one/checkpoints").glob("step-*"))


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, recipe: Write, weftlm: Weftlm) -> None:
    path = recipe()
    weftlm("train", path, "--set", "training.steps=20")
    run = tmp_path / "runs/one"
    expected = (run / "model/model.safetensors").read_bytes()
    (run / "result.json").unlink()
    newest = max((run / "checkpoints").glob("step-*"))
    state = newest / "tensors.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    finished = weftlm("train", path, "--set", "training.steps=20")
    assert "trying the checkpoint before it" in finished.stderr
    assert newest.name in finished.stderr
    assert (run / "model/model.safetensors").read_bytes() == expected

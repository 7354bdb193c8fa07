"""`weftlm run` and `weftlm status` on a tiny project: every stage, then nothing, then only what a change reaches."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command_line import Call, start
from support.tiny_project import WORDS, recipe_value

from weftlm.pipeline.any_model import open_model
from weftlm.serving.server import Server

PARTS: dict[str, Any] = {
    "evaluation": {"every_steps": 30, "tasks": [{"path": "ask.jsonl"}]},
    "training": {**recipe_value()["training"], "steps": 20},
    "experts": {
        "baseline": "uniform",
        "lora": {"rank": 2, "alpha": 4},
        "training": {"sequence_length": 32, "batch_sequences": 8, "steps": 8, "lr": 3e-3, "device": "cpu"},
        "validate_every_steps": 0,
        "gate": {"steps": 2},
        "statistics_examples": 8,
    },
    "routing": {"routers": ["merged", "phatgoose"], "build": ["phatgoose"]},
    "gating": {
        "scores": {"length": 8, "sequences": 24, "samples": 16, "batch_size": 40},
        "fit": {"unit": "token", "steps": 60, "report_every_steps": 30, "best_response_steps": 20},
        "held_out_fraction": 0.5,
        "students": {"distil": {"steps": 10, "evaluate_every_steps": 10}, "experts_per_token": [1]},
    },
    "compare": {"mixtures": ["uniform"], "monolith": True},
}


def states(call: Call) -> dict[str, str]:
    found = call("status", "runs/one", "--json")
    return {stage["stage"]: stage["state"] for stage in found["stages"]}


def acts(call: Call, *arguments: str) -> dict[str, str]:
    planned = call("run", "recipe.yaml", "--dry-run", "--json", *arguments)
    return {stage["stage"]: stage["act"] for stage in planned["stages"]}


def check_the_end(said: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model with its figure, the best one marked, and two commands that can be given as they stand."""
    models = json.loads(Path("runs/one/evaluation.json").read_text())["models"]
    means = {name: facts["generic"]["bits_per_byte"] for name, facts in models.items()}
    best = min(means, key=means.__getitem__)
    lines = said.splitlines()
    for name, mean in means.items():
        (row,) = (line for line in lines if line.startswith(f"│ {name} "))
        assert f" {mean:.4f} " in row
        assert ("best on the domains" in row) == (name == best)
    serve, read = lines[-2:]
    assert (serve.partition(": ")[0], read.partition(": ")[0]) == ("serve it", "read about it")
    name, *words = shlex.split(serve.partition(": ")[2])
    assert (name, words[0], words[1]) == ("weftlm", "serve", models[best]["path"])
    with monkeypatch.context() as patch:
        patch.setattr(Server, "run", lambda self, sockets=None: None)  # it would serve until it is stopped
        call(*words, "--port", "0")
    *command, page = shlex.split(read.partition(": ")[2])
    assert command == ["python", "-m", "webbrowser"]
    assert Path(page).read_text().startswith("<!DOCTYPE html>")


def test_a_project_runs_once_and_then_only_what_changed(
    call: Call, recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    path = recipe(PARTS)
    question = {"prompt": "pan butter ", "choices": ["onion", "mast"], "answer": "onion"}
    asked = tmp_path / "ask.jsonl"
    asked.write_text(json.dumps(question) + "\n")
    refused = call("status", "runs/one", code=2)
    assert "there is no folder runs/one" in refused
    assert set(acts(call).values()) == {"run"}
    assert not (tmp_path / "runs").exists(), "--dry-run writes nothing"

    check_the_end(call("run", path), call, monkeypatch)
    assert set(states(call).values()) == {"done"}
    summary = json.loads((tmp_path / "runs/one/summary.json").read_text())
    assert list(summary["mixture"]) == ["dga", "uniform"]
    assert set(summary["routing"]) == {"base", "merged", "phatgoose", "best single", "oracle"}
    assert {"monolith", "uniform", "bayes", "fixed share", "robust", "student"} < set(summary["robust"])
    models = summary["models"]
    assert list(models) == [
        "mixture: dga", "baseline: uniform", "baseline: monolith", "routed: phatgoose", "gate: student",
        "gate: student-top-1",
    ]  # fmt: skip
    for model in models.values():
        assert set(model["sets"]) == {"target", *WORDS}
        assert all(0 < each["bits_per_byte"] < 8 for each in model["sets"].values())
        assert model["tasks"]["ask"]["accuracy"] in (0.0, 1.0)
        assert open_model(model["path"]).kind == model["kind"]
    library = json.loads((tmp_path / "runs/one/experts/library.json").read_text())
    assert library["base"]["name"].endswith("runs/one/baselines/uniform/model")
    page = (tmp_path / "runs/one/report.html").read_text()
    for heading in ("Every model", "Mixture over time", "Routing", "Robust gate"):
        assert f">{heading}<" in page
    assert "What helped: bits per byte of held-out text, mean over the sets, against baseline: uniform" in page
    assert "Share of right answers by model" in page
    assert "Share of right answers by router" in page

    assert set(acts(call).values()) == {"skip"}
    call("run", path)
    assert call.err.count("done already") == 10

    steps = ("--set", "gating.students.distil.steps=5")
    assert [stage for stage, act in acts(call, *steps).items() if act == "replace"] == ["distil", "evaluate", "report"]
    slower = call("run", path, "--set", "training.lr=1e-4", code=2)
    assert "the stage train was made of something else (training.lr: 0.003 before, 0.0001 now)" in slower
    assert "weftlm run --from train" in slower
    asked.write_text(json.dumps({**question, "answer": "mast"}) + "\n")
    stale = [stage for stage, act in acts(call).items() if act == "replace"]
    assert stale == ["route", "evaluate", "report"], "a task's questions reach what asks them"
    asked.write_text(json.dumps(question) + "\n")
    routed = tmp_path / "runs/one/routed/phatgoose"
    routed.rename(tmp_path / "away")
    gone = call("status", "runs/one", "--json")
    assert "routed/phatgoose/routed.json is gone" in {each["stage"]: each["why"] for each in gone["stages"]}["route"]
    (tmp_path / "away").rename(routed)
    (tmp_path / "runs/one/gate/fit.json").write_text("{}")
    assert states(call)["gate"] == "stale"
    call("run", path, "--until", "gate")
    assert states(call)["gate"] == "done"


def test_a_run_is_looked_at_from_anywhere(
    call: Call, recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = recipe_value()["data"]
    for corpus in (*data["corpora"], *data["target"]):
        corpus["path"] = str(tmp_path / corpus["path"])
    call("run", recipe({"data": data}), "--until", "prepare")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = call("status", "../runs/one", "--json")
    assert [stage["state"] for stage in found["stages"]] == ["done", "to do", "to do", "to do"]


def test_a_killed_pipeline_continues(call: Call, recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe({"training": {**recipe_value()["training"], "steps": 4000, "save_every_steps": 5}})
    checkpoints = tmp_path / "runs/one/checkpoints"
    process = start(tmp_path, "run", path)
    try:
        end = time.monotonic() + 120
        while not any(checkpoints.glob("step-*")) and time.monotonic() < end:
            assert os.waitpid(process, os.WNOHANG) == (0, 0)
            time.sleep(0.05)
        assert states(call)["train"] == "running"
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert states(call) == {"prepare": "done", "train": "interrupted", "evaluate": "to do", "report": "to do"}
    assert acts(call)["train"] == "continue"

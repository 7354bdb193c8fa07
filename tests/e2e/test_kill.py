"""Killed at any moment, a run continues to the same bits."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.tiny_project import command, environment

Write = Callable[..., Path]


def mixture_history(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] in ("mixture", "eval")]


def train(folder: Path, recipe: Path, run: str) -> None:
    subprocess.run(
        command("train", recipe, "--set", f"run={run}", "--set", "prepared=prepared"),
        cwd=folder, env=environment(), check=True, capture_output=True, timeout=300,
    )  # fmt: skip


def kill_somewhere(folder: Path, recipe: Path, run: str, rng: random.Random) -> int:
    """Start a run and kill it at a random moment after its first step; returns the last logged step."""
    metrics = folder / run / "metrics.jsonl"
    before = len(metrics.read_text()) if metrics.exists() else 0
    process = subprocess.Popen(
        command("train", recipe, "--set", f"run={run}", "--set", "prepared=prepared"),
        cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and len(metrics.read_text()) > before + 50:
            break
        time.sleep(0.005)
    time.sleep(rng.random() * 0.6)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    return max((json.loads(line)["step"] for line in metrics.read_text().splitlines() if line.endswith("}")), default=0)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "kills"), [("dga", 3), ("doremi", 2)])
def test_a_run_killed_again_and_again_ends_in_the_same_bits(
    tmp_path: Path, recipe: Write, policy: str, kills: int
) -> None:
    """DoReMi trains its reference first: there a kill may also hit the run inside the run."""
    path = recipe({"mixture": {"policy": policy, "update_every_steps": 4}, "evaluation": {"every_steps": 30}})
    train(tmp_path, path, "runs/whole")
    rng = random.Random(policy)
    stops = [kill_somewhere(tmp_path, path, "runs/killed", rng) for _ in range(kills)]
    assert any(0 < step < 60 for step in stops), f"no kill hit the middle of training: {stops}"
    train(tmp_path, path, "runs/killed")

    whole, killed = tmp_path / "runs/whole", tmp_path / "runs/killed"
    expected, found = load_file(whole / "model/model.safetensors"), load_file(killed / "model/model.safetensors")
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)
    assert mixture_history(killed) == mixture_history(whole)

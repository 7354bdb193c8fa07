"""Killed at any moment, a run continues to the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.command_line import start

Write = Callable[..., Path]


def lines_of(run: Path) -> list[dict[str, Any]]:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def begin(folder: Path, recipe: Path, run: str) -> int:
    """`weftlm train` in a process of its own; its number."""
    return start(folder, "train", recipe, "--set", f"run={run}", "--set", "prepared=prepared")


def train(folder: Path, recipe: Path, run: str) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(begin(folder, recipe, run), 0)[1]) == 0


def logged_step(run: Path) -> int:
    """The last step on record; 0 before the first."""
    return max((line["step"] for line in lines_of(run)), default=0)


def kill_somewhere(folder: Path, recipe: Path, run: str, rng: random.Random) -> int:
    """Start a run and kill it at a random moment after it has gone on some steps; returns the last logged step."""
    enough, child = logged_step(folder / run) + rng.choice((5, 10, 15)), begin(folder, recipe, run)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and os.waitpid(child, os.WNOHANG) == (0, 0):
        if logged_step(folder / run) >= enough:
            time.sleep(rng.random() * 0.2)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.005)
    return logged_step(folder / run)


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
    histories = [[line for line in lines_of(run) if line["kind"] in ("mixture", "eval")] for run in (killed, whole)]
    assert histories[0] == histories[1]

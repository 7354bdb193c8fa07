"""Two gloo processes train as one does, and a run moves between one process and two."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.tiny_project import command, environment, write_corpora, write_recipe


def train(folder: Path, recipe: Path, run: str, *, processes: int, extra: tuple[str, ...] = ()) -> None:
    settings = ["--set", f"run={run}", "--set", "prepared=prepared", *extra]
    arguments = command("train", recipe, *settings)
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
            "--master-addr", "127.0.0.1", "--master-port", str(port),
        ]  # fmt: skip
        arguments = [*launcher, *arguments[1:]]
    finished = subprocess.run(
        arguments, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr[-4000:]


def mixtures(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "mixture"]


def assert_close(first: Path, second: Path) -> None:
    one, two = load_file(first / "model/model.safetensors"), load_file(second / "model/model.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).abs().max().item() < 1e-5, name
    for left, right in zip(mixtures(first), mixtures(second), strict=True):
        for name, weight in left["weights"].items():
            assert weight == pytest.approx(right["weights"][name], abs=1e-5), (name, left["step"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("estimator", ["shadow", "cumulative", "separate"])
def test_two_processes_equal_one(tmp_path: Path, estimator: str) -> None:
    write_corpora(tmp_path / "corpora")
    recipe = write_recipe(tmp_path, {"alignment": {"estimator": estimator, "target_sequences": 8}})
    micro = ("--set", "training.micro_batch_sequences=1") if estimator == "cumulative" else ()
    extra = ("--set", "training.steps=20", "--set", "evaluation.every_steps=10", *micro)
    train(tmp_path, recipe, "runs/one", processes=1, extra=extra)
    train(tmp_path, recipe, "runs/two", processes=2, extra=extra)
    assert_close(tmp_path / "runs/one", tmp_path / "runs/two")
    first = json.loads((tmp_path / "runs/one/result.json").read_text())
    second = json.loads((tmp_path / "runs/two/result.json").read_text())
    assert first["sets"]["target"]["nats_per_token"] == pytest.approx(
        second["sets"]["target"]["nats_per_token"], abs=1e-4
    )


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_moves_between_world_sizes(tmp_path: Path, before: int, after: int) -> None:
    write_corpora(tmp_path / "corpora")
    recipe = write_recipe(tmp_path)
    train(tmp_path, recipe, "runs/whole", processes=1)
    train(tmp_path, recipe, "runs/moved", processes=before)
    run = tmp_path / "runs/moved"
    # Take the run back to its last but one checkpoint, as if it had been stopped there.
    (run / "result.json").unlink()
    newest = max((run / "checkpoints").glob("step-*"))
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    train(tmp_path, recipe, "runs/moved", processes=after)
    assert_close(tmp_path / "runs/whole", tmp_path / "runs/moved")

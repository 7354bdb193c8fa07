"""Two gloo processes train as one does, and a run moves between one process and two."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.command_line import Call
from support.tiny_project import command, environment, write_corpora, write_recipe

Train = Callable[..., None]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """`train(recipe, run, processes=2)`: `weftlm train` under torchrun, or in this process where one is enough."""
    write_corpora(tmp_path / "corpora")
    monkeypatch.chdir(tmp_path)
    call = Call(capsys)

    def run(recipe: Path, folder: str, *, processes: int, extra: tuple[str, ...] = ()) -> None:
        arguments = ["train", recipe, "--set", f"run={folder}", "--set", "prepared=prepared", *extra]
        if processes == 1:
            call(*arguments)
            return
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
            "--master-addr", "127.0.0.1", "--master-port", str(port),
        ]  # fmt: skip
        finished = subprocess.run(
            [*launcher, *command(*arguments)[1:]],
            cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr[-4000:]

    return run


def back_to_the_checkpoint_before(run: Path) -> None:
    """Take a finished run back to its last but one checkpoint, as if it had been stopped there."""
    (run / "result.json").unlink()
    shutil.rmtree(max((run / "checkpoints").glob("step-*")))


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


EXTRA = ("--set", "training.steps=12", "--set", "evaluation.every_steps=6", "--set", "training.save_every_steps=6")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_equal_one_and_a_run_moves_either_way(tmp_path: Path, train: Train) -> None:
    recipe = write_recipe(tmp_path)
    train(recipe, "runs/one", processes=1, extra=EXTRA)
    train(recipe, "runs/two", processes=2, extra=EXTRA)
    assert_close(tmp_path / "runs/one", tmp_path / "runs/two")
    nats = [
        json.loads((tmp_path / f"runs/{run}/result.json").read_text())["sets"]["target"]["nats_per_token"]
        for run in ("one", "two")
    ]
    assert nats[0] == pytest.approx(nats[1], abs=1e-4)
    shutil.copytree(tmp_path / "runs/one", tmp_path / "runs/whole")
    for moved, processes in (("two", 1), ("one", 2)):
        back_to_the_checkpoint_before(tmp_path / f"runs/{moved}")
        train(recipe, f"runs/{moved}", processes=processes, extra=EXTRA)
        assert_close(tmp_path / "runs/whole", tmp_path / f"runs/{moved}")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_split_model_equals_a_whole_one_and_goes_on_whole(tmp_path: Path, train: Train) -> None:
    recipe = write_recipe(tmp_path, {"alignment": {"estimator": "separate", "target_sequences": 7}})
    train(recipe, "runs/whole", processes=1, extra=EXTRA)
    train(recipe, "runs/moved", processes=2, extra=(*EXTRA, "--set", "training.parallel=fsdp2"))
    assert_close(tmp_path / "runs/whole", tmp_path / "runs/moved")
    described = json.loads((tmp_path / "runs/moved/run.json").read_text())
    assert {choice["setting"]: choice["value"] for choice in described["runtime"]}["parallel"] == "fsdp2"
    results = [json.loads((tmp_path / f"runs/{run}/result.json").read_text()) for run in ("whole", "moved")]
    for key in ("identity", "parameters", "trainable_parameters", "estimator"):
        assert results[0][key] == results[1][key]

    back_to_the_checkpoint_before(tmp_path / "runs/moved")
    train(recipe, "runs/moved", processes=1, extra=EXTRA)
    assert_close(tmp_path / "runs/whole", tmp_path / "runs/moved")

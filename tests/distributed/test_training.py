"""Two gloo processes train as one does, and a run moves between one process and two."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.command_line import Call
from support.mixtures import lines_of
from support.ranks import Ranks
from support.tiny_project import command, environment, write_corpora, write_recipe

from weftlm.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
Train = Callable[..., None]


def on_ranks(rank: int, world: int, folder: Path) -> int:
    """The command line of `folder/words.json` on every rank; gives its exit code."""
    os.chdir(folder)
    try:
        main(json.loads((folder / "words.json").read_text()))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ranks: Ranks) -> Train:
    """`train(recipe, run, by="one")`: `weftlm train` in this process, on two living ranks, or by torchrun."""
    write_corpora(tmp_path / "corpora")
    monkeypatch.chdir(tmp_path)
    call = Call(capsys)
    sizes = {"training.steps": 12, "training.save_every_steps": 6, "evaluation.every_steps": 6, "prepared": "prepared"}

    def run(recipe: Path, folder: str, *, by: str, **changes: str) -> None:
        settings = {**sizes, "run": folder, **changes}
        words = [
            "train",
            str(recipe),
            *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
        ]
        if by == "one":
            call(*words)
        elif by == "two":
            (tmp_path / "words.json").write_text(json.dumps(words))
            assert ranks(__file__, "on_ranks", tmp_path) == [0, 0]
        else:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
            finished = subprocess.run(
                [sys.executable, *launcher, "--master-addr=127.0.0.1", *command(*words)[1:]],
                cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip
            assert finished.returncode == 0, finished.stderr[-4000:]

    return run


def back_to_the_checkpoint_before(run: Path) -> None:
    """Take a finished run back to its last but one checkpoint, as if it had been stopped there."""
    (run / "result.json").unlink()
    shutil.rmtree(max((run / "checkpoints").glob("step-*")))


def assert_close(first: Path, second: Path) -> None:
    one, two = load_file(first / "model/model.safetensors"), load_file(second / "model/model.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).abs().max().item() < 1e-5, name
    for left, right in zip(lines_of(first, "mixture"), lines_of(second, "mixture"), strict=True):
        for name, weight in left["weights"].items():
            assert weight == pytest.approx(right["weights"][name], abs=1e-5), (name, left["step"])


def test_two_processes_equal_one_and_a_run_moves_either_way(tmp_path: Path, train: Train) -> None:
    recipe = write_recipe(tmp_path)
    train(recipe, "runs/one", by="one")
    train(recipe, "runs/two", by="torchrun")
    one, two = tmp_path / "runs/one", tmp_path / "runs/two"
    assert_close(one, two)
    results = [json.loads((run / "result.json").read_text())["sets"]["target"] for run in (one, two)]
    assert results[0]["nats_per_token"] == pytest.approx(results[1]["nats_per_token"], abs=1e-4)
    shutil.copytree(one, tmp_path / "runs/whole")
    for moved, by in ((two, "one"), (one, "two")):
        back_to_the_checkpoint_before(moved)
        train(recipe, f"runs/{moved.name}", by=by)
        assert_close(tmp_path / "runs/whole", moved)


def test_a_split_model_equals_a_whole_one(tmp_path: Path, train: Train) -> None:
    recipe = write_recipe(tmp_path, {"alignment": {"estimator": "separate", "target_sequences": 7}})
    whole, moved = tmp_path / "runs/whole", tmp_path / "runs/moved"
    train(recipe, "runs/whole", by="one")
    train(recipe, "runs/moved", by="two", **{"training.parallel": "fsdp2"})
    assert_close(whole, moved)
    described = json.loads((moved / "run.json").read_text())
    assert {choice["setting"]: choice["value"] for choice in described["runtime"]}["parallel"] == "fsdp2"
    results = [json.loads((run / "result.json").read_text()) for run in (whole, moved)]
    for key in ("identity", "parameters", "trainable_parameters", "estimator"):
        assert results[0][key] == results[1][key]

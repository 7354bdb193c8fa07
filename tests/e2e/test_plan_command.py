"""`weftlm plan` on a tiny recipe: what it prints, and its disk figures beside the files the same recipe leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from support.command_line import Call

from weftlm.pipeline.data_config import TARGET_DOMAIN

Write = Callable[..., Path]

EXPERTS = {
    "lora": {"rank": 4},
    "training": {"steps": 2, "batch_sequences": 4, "sequence_length": 32, "save_every_steps": 2, "device": "cpu"},
    "validate_every_steps": 0,
    "gate": {"steps": 1},
    "statistics_examples": 8,
}
GATING = {"gate": {"gate": "bayes"}, "scores": {"length": 16, "sequences": 8, "samples": 0}}


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_plan_is_printed_with_its_assumptions_and_what_will_not_work(recipe: Write, call: Call) -> None:
    printed = call("plan", recipe(), "--hardware", "2x8xH100", "--mfu", "0.3", "--set", "training.steps=1000")
    for part in ("training", "alignment", "evaluation", "serving", "Assumptions", "30% of the peak of H100", "--mfu"):
        assert part in printed
    assert "steps: 1000" in printed, "overrides count"
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 2, "num_attention_heads": 64}
    path = recipe({"model": {"architecture": "llama", "config": sizes}, "mixture": {"policy": "uniform"}})
    printed = call("plan", path, "--hardware", "1xRTX4090")
    for part in ("does not fit", "What will not work", "fsdp2"):
        assert part in printed
    assert "did you mean 'H100'" in call("plan", path, "--hardware", "8xH10", code=2)


def test_planned_disk_is_what_the_files_take(recipe: Write, call: Call) -> None:
    path = recipe({"mixture": {"policy": "uniform"}, "experts": EXPERTS, "gating": GATING, "trackers": []})
    changes = ("training.steps=4", "training.save_every_steps=2", "evaluation.every_steps=null")
    shorter = [part for change in changes for part in ("--set", change)]
    for command in (("train",), ("experts", "train"), ("score",)):
        call(*command, path, *shorter)
    plan = call("plan", path, "--hardware", "8xH100", "--json", *shorter)
    stages = {stage["name"]: stage for stage in plan["stages"]}
    run = path.parent / "runs/one"
    assert stages["data"]["facts"]["domains"] == 3
    files = {file.parent.name: file.stat().st_size for file in (run / "data" / "train").rglob("tokens.bin")}
    tokens = sum(size for name, size in files.items() if name != TARGET_DOMAIN)
    assert stages["data"]["disk_bytes"]["tokens"] == tokens
    disk = stages["training"]["disk_bytes"]
    assert disk["checkpoints"] == pytest.approx(bytes_in(run / "checkpoints"), rel=0.05)
    assert disk["model"] == pytest.approx((run / "model" / "model.safetensors").stat().st_size, rel=0.02)
    assert stages["experts"]["disk_bytes"]["library"] == pytest.approx(bytes_in(run / "experts"), rel=0.05)
    shards = [load_file(file) for file in (run / "scores").glob("*.safetensors")]
    arrays = sum(array.nbytes for shard in shards for array in shard.values())
    assert stages["scores"]["disk_bytes"]["score cache"] == arrays
    assert any("prepared data" in line for line in plan["assumptions"])

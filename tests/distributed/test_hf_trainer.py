"""An online mixture under transformers.Trainer in two gloo processes equals one, and a run moves from two to one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.mixtures import BATCH, light_collections, online, quiet, updates_of
from support.mixtures import model as tiny_model
from support.ranks import Ranks
from transformers import Trainer

from weftlm.integrations.hf_trainer import MixtureCallback

POLICIES = ("dga", "group_dro")


def train(folder: Path, policy: str, ranks: int, resume: Path | None = None) -> list[dict[str, Any]]:
    mixture = online({"policy": policy})
    arguments = quiet(folder, per_device_train_batch_size=BATCH // 2 // ranks, save_strategy="steps", save_steps=6)
    trainer = Trainer(tiny_model(), arguments, train_dataset=mixture.dataset, callbacks=[MixtureCallback(mixture)])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return updates_of(trainer)


def both(rank: int, world: int, folder: Path) -> dict[str, Any]:
    with light_collections():
        return {policy: train(folder / policy, policy, world) for policy in POLICIES}


def assert_close(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    for one, two in zip(first, second, strict=True):
        assert one == pytest.approx(two, abs=1e-6)


def assert_same_model(first: Path, second: Path) -> None:
    one, two = (load_file(folder / "checkpoint-12" / "model.safetensors") for folder in (first, second))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6


@pytest.mark.distributed
def test_two_processes_equal_one_and_a_run_moves_from_two_to_one(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(__file__, "both", tmp_path)
    assert first == second
    alone = both(0, 1, tmp_path / "one")
    for policy in POLICIES:
        assert_close(first[policy], alone[policy])
        assert_same_model(tmp_path / policy, tmp_path / "one" / policy)
        moved = train(tmp_path / "moved", policy, 1, resume=tmp_path / policy / "checkpoint-6")
        assert_close(moved, alone[policy])
        assert_same_model(tmp_path / "moved", tmp_path / "one" / policy)

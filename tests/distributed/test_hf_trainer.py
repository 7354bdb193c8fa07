"""An online mixture under transformers.Trainer in two gloo processes equals one, and a run moves from two to one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))  # a rank runs without pytest, which would have done so
from safetensors.torch import load_file
from support.mixtures import BATCH, light_collections, online, quiet, updates_of
from support.mixtures import model as tiny_model
from transformers import Trainer

from weftlm.integrations.hf_trainer import MixtureCallback

POLICIES = ("dga", "group_dro")


def train(folder: Path, policy: str, ranks: int, resume: Path | None = None) -> list[dict[str, Any]]:
    mixture = online({"policy": policy})
    arguments = quiet(folder, per_device_train_batch_size=BATCH // 2 // ranks, save_strategy="steps", save_steps=6)
    trainer = Trainer(tiny_model(), arguments, train_dataset=mixture.dataset, callbacks=[MixtureCallback(mixture)])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return updates_of(trainer)


def both(folder: Path, ranks: int) -> dict[str, Any]:
    with light_collections():
        return {policy: train(folder / policy, policy, ranks) for policy in POLICIES}


def assert_close(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    for one, two in zip(first, second, strict=True):
        assert one == pytest.approx(two, abs=1e-6)


def assert_same_model(first: Path, second: Path) -> None:
    one, two = (load_file(folder / "checkpoint-12" / "model.safetensors") for folder in (first, second))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6


@pytest.mark.distributed
def test_two_processes_equal_one_and_a_run_moves_from_two_to_one(run_ranks: Any, tmp_path: Path) -> None:
    first, second = run_ranks(__file__, "both")
    assert first == second
    alone = both(tmp_path / "one", 1)
    for policy in POLICIES:
        assert_close(first[policy], alone[policy])
        assert_same_model(tmp_path / policy, tmp_path / "one" / policy)
        moved = train(tmp_path / "moved", policy, 1, resume=tmp_path / policy / "checkpoint-6")
        assert_close(moved, alone[policy])
        assert_same_model(tmp_path / "moved", tmp_path / "one" / policy)


def rank_main() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['WEFTLM_TEST_STORE']}", rank=rank, world_size=world
    )
    answer = Path(os.environ["WEFTLM_TEST_ANSWER"])
    answer.write_text(json.dumps(both(answer.parent, world)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    rank_main()

"""Two gloo ranks write the score cache one process writes, byte for byte."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from weftlm.corpora.source import ArraySource
from weftlm.errors import DataError
from weftlm.gating.config import ScoreConfig
from weftlm.gating.experts import ExpertPool
from weftlm.gating.scores import score


def tiny_pool(seed: int = 0) -> ExpertPool:
    models = {}
    for name in ("a", "b"):
        torch.manual_seed(seed)
        seed += 1
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32,
        )  # fmt: skip
        models[name] = LlamaForCausalLM(config)
    return ExpertPool.of(models)


def run(folder: Path, seed: int = 0) -> dict[str, str]:
    rng = np.random.default_rng(0)
    domains = {name: ArraySource(rng.integers(0, 32, 200)) for name in ("x", "y")}
    config = ScoreConfig(length=8, sequences=9, samples=7, batch_size=2, shard_sequences=3)
    score(tiny_pool(seed), domains, folder, config, show=False)
    return {path.name: path.read_bytes().hex() for path in [*folder.glob("*.npy"), folder / "index.json"]}


def both(store: Path) -> dict[str, str]:
    return run(store.with_name("cache"))


def stale(store: Path) -> dict[str, str]:
    try:
        run(store.with_name("cache"), seed=7)
    except DataError as error:
        return {"error": str(error)}
    return {}


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_write_the_same_bytes(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    alone = run(tmp_path / "alone")
    assert len(alone) == 4 * 4 + 1
    assert run_ranks(__file__, "both") == [alone, alone]
    for answer in run_ranks(__file__, "stale"):  # every rank refuses, and none waits for another
        assert "stale" in answer["error"]


def rank_main(cases: dict[str, Callable[[Path], Any]]) -> None:
    torch.set_num_threads(1)
    store = Path(os.environ["WEFTLM_TEST_STORE"])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    answer = cases[sys.argv[1]](store)
    Path(os.environ["WEFTLM_TEST_ANSWER"]).write_text(json.dumps(answer))
    dist.destroy_process_group()


if __name__ == "__main__":
    rank_main({"both": both, "stale": stale})

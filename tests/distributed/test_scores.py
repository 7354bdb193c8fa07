"""Two gloo ranks write the score cache one process writes, byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.ranks import Ranks
from support.tiny_expert import llama

from weftlm.corpora.source import ArraySource
from weftlm.errors import CheckpointError
from weftlm.gating.config import ScoreConfig
from weftlm.gating.experts import ExpertPool
from weftlm.gating.scores import score


def run(folder: Path, seed: int = 0) -> dict[str, str]:
    rng = np.random.default_rng(0)
    pool = ExpertPool.of({"a": llama(seed, vocab_size=32), "b": llama(seed + 1, vocab_size=32)})
    domains = {name: ArraySource(rng.integers(0, 32, 200)) for name in ("x", "y")}
    config = ScoreConfig(length=8, sequences=9, samples=7, batch_size=2, shard_sequences=3)
    score(pool, domains, folder, config, show=False)
    return {path.name: path.read_bytes().hex() for path in [*folder.glob("*.safetensors"), folder / "index.json"]}


def both(rank: int, world: int, folder: Path) -> dict[str, str]:
    return run(folder / "cache")


def stale(rank: int, world: int, folder: Path) -> dict[str, str]:
    try:
        run(folder / "cache", seed=7)
    except CheckpointError as error:
        return {"error": str(error)}
    return {}


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_write_the_same_bytes(tmp_path: Path, ranks: Ranks) -> None:
    alone = run(tmp_path / "alone")
    assert len(alone) == 4 * 3 + 1
    assert ranks(__file__, "both", tmp_path) == [alone, alone]
    for answer in ranks(__file__, "stale", tmp_path):  # every rank refuses, and none waits for another
        assert "something else" in answer["error"]

"""Two gloo ranks score a held-out set as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from support.ranks import Ranks
from support.tiny_expert import VOCAB, llama

from weftlm.corpora.source import ArraySource
from weftlm.evaluation.perplexity import evaluate_source

CASES = [(331, None), (331, 100), (20, None), (161, None)]  # (331: 21 windows with a tail), capped, 2 windows, 10


def scored(model: Any, device: Any) -> list[dict[str, Any]]:
    found = []
    for count, limit in CASES:
        source = ArraySource(np.random.default_rng(0).integers(0, VOCAB, count), text_bytes=1000)
        result = evaluate_source(
            model, source, sequence_length=16, batch_size=4, max_tokens=limit, device=device, distributed=True
        )
        found.append({**result.to_json(), "windows": result.windows.nats_N.tolist()})
    return found


def measure(rank: int, world: int, folder: Path) -> list[dict[str, Any]]:
    accelerator = Accelerator(cpu=True)
    return scored(accelerator.prepare(llama()), accelerator.device)


@pytest.mark.distributed
def test_two_ranks_find_what_one_finds(tmp_path: Path, ranks: Ranks) -> None:
    first, second = ranks(__file__, "measure", tmp_path)
    assert first == second
    for together, single in zip(first, scored(llama(), "cpu"), strict=True):  # no process group: one rank
        assert together.keys() == single.keys()
        for name in single:
            assert together[name] == pytest.approx(single[name], rel=1e-6), name

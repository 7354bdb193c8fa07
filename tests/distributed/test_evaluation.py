"""Two gloo ranks score a held-out set as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from support.ranks import Ranks
from transformers import LlamaConfig, LlamaForCausalLM

from weftlm.evaluation.perplexity import evaluate_source
from weftlm.evaluation.result import SetResult


class Source:
    """Random tokens in memory."""

    fingerprint = "random"
    bytes = 1000

    def __init__(self, count: int) -> None:
        self.tokens_N = np.random.default_rng(0).integers(0, 32, count)

    def __len__(self) -> int:
        return len(self.tokens_N)

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        return self.tokens_N[start : start + count].copy()

    def read_many(self, starts_N: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        return np.stack([self.read(int(start), count) for start in starts_N])


CASES = [(331, None), (331, 100), (20, None), (161, None)]  # (331: 21 windows with a tail), capped, 2 windows, 10


def evaluate_cases(model: Any, device: Any, distributed: bool) -> list[SetResult]:
    return [
        evaluate_source(
            model,
            Source(count),
            sequence_length=16,
            batch_size=4,
            max_tokens=limit,
            device=device,
            distributed=distributed,
        )
        for count, limit in CASES
    ]


def numbers(results: list[SetResult]) -> list[dict[str, Any]]:
    return [{**r.to_json(), "windows": r.windows.nats_N.tolist()} for r in results]


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )


def measure(rank: int, world: int, folder: Path) -> list[dict[str, Any]]:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(tiny_model())
    return numbers(evaluate_cases(model, accelerator.device, distributed=True))


@pytest.mark.distributed
def test_two_ranks_find_what_one_finds(tmp_path: Path, ranks: Ranks) -> None:
    first, second = ranks(__file__, "measure", tmp_path)
    assert first == second
    alone = numbers(evaluate_cases(tiny_model(), "cpu", distributed=True))  # no process group: one rank
    for together, single in zip(first, alone, strict=True):
        assert together.keys() == single.keys()
        for name in single:
            assert together[name] == pytest.approx(single[name], rel=1e-6), name

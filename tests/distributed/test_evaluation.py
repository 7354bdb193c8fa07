"""Two gloo ranks score a held-out set as one process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import distributed as dist
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


def worker(output: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(tiny_model())
    results = evaluate_cases(model, accelerator.device, distributed=True)
    (output / f"rank{accelerator.process_index}.json").write_text(json.dumps(numbers(results)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, str(tmp_path)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    alone = numbers(evaluate_cases(tiny_model(), "cpu", distributed=True))  # no process group: one rank
    for together, single in zip(first, alone, strict=True):
        assert together.keys() == single.keys()
        for name in single:
            assert together[name] == pytest.approx(single[name], rel=1e-6), name


if __name__ == "__main__":
    worker(Path(sys.argv[1]))

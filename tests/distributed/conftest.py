"""Runs a test file as the program of several gloo ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RunRanks = Callable[..., list[Any]]


@pytest.fixture
def run_ranks(tmp_path: Path) -> RunRanks:
    """`run_ranks(__file__, "case", ranks=2)` runs the file once per rank and returns what each rank gave.

    The file ends in

        if __name__ == "__main__":
            rank_main({"case": function, ...})

    with `rank_main` as below written out there, because a rank must be able to run without pytest.
    """

    def run(program: str, case: str, *, ranks: int = 2, timeout: float = 240) -> list[Any]:
        processes, answers = [], [tmp_path / f"{case}-{rank}.json" for rank in range(ranks)]
        calm = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
        for rank, answer in enumerate(answers):
            place = {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "WEFT_TEST_STORE": str(tmp_path / f"{case}-store"),
                "WEFT_TEST_ANSWER": str(answer),
            }
            command = [sys.executable, "-W", "error::UserWarning", program, case]
            processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **calm, **place},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
            assert process.returncode == 0, f"rank {rank} of {case} failed:\n{output[-4000:]}"
        return [json.loads(answer.read_text()) for answer in answers]

    return run

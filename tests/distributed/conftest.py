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

    with `rank_main` as in `test_alignment_ddp.py` written out there, because a rank must be able to run without pytest.
    """
    return ranks_in(tmp_path)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder all tests of a file share, with each other and with the ranks of `run_shared_ranks`."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def run_shared_ranks(shared_folder: Path) -> RunRanks:
    """`run_ranks` for a fixture of module scope: ranks start once and many tests look at what they left."""
    return ranks_in(shared_folder)


def ranks_in(folder: Path) -> RunRanks:
    """`run_ranks` with its files in a folder, which the ranks find as that of `WEFTLM_TEST_ANSWER`."""

    def run(program: str, case: str, *, ranks: int = 2, timeout: float = 240) -> list[Any]:
        processes, answers = [], [folder / f"{case}-{rank}.json" for rank in range(ranks)]
        calm = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
        for rank, answer in enumerate(answers):
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",  # accelerate asks for both; the ranks themselves meet in a file
                "MASTER_PORT": "0",
                "WEFTLM_TEST_STORE": str(folder / f"{case}-store"),
                "WEFTLM_TEST_ANSWER": str(answer),
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

"""Gloo ranks that live through a test session and run functions of test files, so that they start once."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CALM = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}


class Ranks:
    """`ranks(__file__, "case", folder)` calls `case(rank, world, folder)` of the file on every rank.

    Args:
        folder: folder of the ranks' own files.
        count: number of ranks.
    """

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.folder, self.count = folder, count
        self._processes: list[subprocess.Popen[str]] = []

    def __call__(self, program: str, case: str, folder: Path, *, timeout: float = 900) -> list[Any]:
        """What each rank returned, through JSON."""
        if not self._processes:
            self._start()
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(json.dumps([program, case, str(folder)]) + "\n")
                process.stdin.flush()
            with ThreadPoolExecutor(self.count) as pool:
                waiting = [pool.submit(process.stdout.readline) for process in self._processes if process.stdout]
                try:
                    return [json.loads(each.result(timeout)) for each in waiting]
                except (TimeoutError, ValueError):
                    self.close()  # ends the reading threads too
                    raise
        except (OSError, TimeoutError, ValueError):
            self.close()
            said = [(self.folder / f"stderr-{rank}").read_text()[-4000:] for rank in range(self.count)]
            raise AssertionError(f"{case} failed on a rank:\n" + "\n".join(said)) from None

    def _start(self) -> None:
        store = self.folder / "store"
        store.unlink(missing_ok=True)
        for rank in range(self.count):
            place = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.count),
                "LOCAL_WORLD_SIZE": str(self.count),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",  # accelerate asks for them; ranks meet in a file
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)]),
            }  # fmt: skip
            with (self.folder / f"stderr-{rank}").open("w") as errors:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-W", "error::UserWarning", __file__, str(store)],
                        env={**os.environ, **CALM, **place}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                        stderr=errors, text=True,
                    )
                )  # fmt: skip

    def close(self) -> None:
        """End the ranks; the next call starts others."""
        for process in self._processes:
            process.kill()
            process.wait()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self._processes = []


def serve(store: str) -> None:
    """Be a rank: run what stdin names, a line per call, and answer on what stdout was."""
    import torch
    from torch import distributed as dist

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a case prints is no answer
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    modules: dict[str, Any] = {}
    for line in sys.stdin:
        program, case, folder = json.loads(line)
        if program not in modules:
            spec = importlib.util.spec_from_file_location(Path(program).stem, program)
            assert spec is not None
            assert spec.loader is not None
            modules[program] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[program])
        torch.manual_seed(0)
        answer = getattr(modules[program], case)(rank, world, Path(folder))
        dist.barrier()
        gc.collect()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1])

"""The number of threads a run computes with, kept to the cores that are free.

OpenMP's threads spin while they wait for each other. Alone that is the fastest setting; beside another busy process
they wait for threads that are not running, and small models train up to ten times slower than with one thread. So the
number follows the load: `follow_load`, called between steps, looks at most once a second at how busy other processes
keep the machine, and gives this process the cores that are left.

Example on two cores: another process starts and uses 0.9 of a core. Two looks in a row find 2 - 0.9 = 1.1 cores free,
so the next step runs on one thread; two looks after the other process ends, it runs on two again.

The last bits of a result depend on the number of threads (sums are split differently). A number that was asked for, by
`training.threads` or OMP_NUM_THREADS, is therefore never changed.
"""

from __future__ import annotations

import logging
import os
import time
from functools import cache
from pathlib import Path

import psutil
import torch

log = logging.getLogger(__name__)

WINDOW_SECONDS = 1.0
FIRST_WINDOW_SECONDS = 0.2
_process = cache(psutil.Process)  # by its number, which a forked process has of its own


def busy_elsewhere() -> float:
    """Cores that other processes have used since the last call.

    Work of lower priority (`nice`) does not count, since it gives way.
    """
    names = ["user", "system", "irq", "softirq", "steal"]
    if hasattr(os, "nice") and os.nice(0) > 0:
        names.append("nice")
    percent = psutil.cpu_times_percent()
    machine: float = sum(getattr(percent, name, 0.0) for name in names) / 100 * (psutil.cpu_count() or 1)
    own: float = _process(os.getpid()).cpu_percent()
    return max(0.0, machine - own / 100)


def usable_cores() -> int:
    """Cores this process may run on: the affinity mask, and a container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such control group, or no quota ("max")
        return cores


class ThreadCount:
    """Decides how many threads to compute with, from how busy other processes are.

    threads = cores - cores used by others in the last window, rounded, within [cores / 2, cores]. Fewer than half
    would leave a crowded machine to the processes that keep spinning.

    Args:
        cores: Most threads to use.
    """

    def __init__(self, cores: int) -> None:
        self.cores = self.threads = self._proposed = cores
        self._looked, _ = time.monotonic(), busy_elsewhere()

    def look(self, window: float = WINDOW_SECONDS, *, at_once: bool = False) -> None:
        """Look at the load since the last look; change the number of threads where two looks in a row agree.

        Args:
            window: Seconds between looks; sooner calls do nothing.
            at_once: Whether one look is enough.
        """
        if time.monotonic() - self._looked < window:
            return
        self._looked, others = time.monotonic(), busy_elsewhere()
        wanted = min(self.cores, max(1, self.cores // 2, round(self.cores - others)))
        confirmed = at_once or wanted == self._proposed
        self._proposed = wanted
        if confirmed and wanted != self.threads:
            log.info(
                "%d threads instead of %d: other processes use %.1f of %d cores (training.threads or OMP_NUM_THREADS "
                "fixes the number)", wanted, self.threads, others, self.cores,
            )  # fmt: skip
            self.threads = wanted
            torch.set_num_threads(wanted)


_count: ThreadCount | None = None
_decided = False
_default = torch.get_num_threads()


def start_following(cores: int) -> int:
    """Use up to `cores` threads from now on, fewer while other processes are busy; returns how many it is now."""
    global _count, _decided  # noqa: PLW0603 - torch's number of threads is one per process as well
    _decided = True
    if _count is None or _count.cores != cores:
        torch.set_num_threads(cores)
        _count = ThreadCount(cores)
        time.sleep(FIRST_WINDOW_SECONDS)
        _count.look(FIRST_WINDOW_SECONDS, at_once=True)
    torch.set_num_threads(_count.threads)
    return _count.threads


def fix_threads(count: int) -> None:
    """Use exactly `count` threads from now on."""
    global _count, _decided
    _count, _decided = None, True
    torch.set_num_threads(count)


def follow_load() -> None:
    """Adapt the number of threads to the machine's load; call it between steps.

    Does nothing where the number is fixed: by `fix_threads`, OMP_NUM_THREADS, or the caller's torch.set_num_threads.
    """
    if not _decided and "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() == _default:
        start_following(usable_cores())
    elif _count is not None:
        _count.look()

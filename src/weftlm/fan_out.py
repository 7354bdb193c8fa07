"""Independent tasks over an executor: processes on this machine, a Ray cluster, or any `concurrent.futures.Executor`.

A worker may die at any moment, and an executor may then repeat its task. So a task must be one that may be done twice:
it depends on its arguments alone, and what it writes appears whole, under a name that depends on nothing else.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from weftlm import __version__, interrupt
from weftlm.errors import ConfigError, WeftError, reason
from weftlm.progress import ProgressBar

_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")

Answer = TypeVar("Answer")
Kept = TypeVar("Kept")


def fan_out(
    executor: Executor,
    tasks: Mapping[str, tuple[Any, ...]],
    work: Callable[..., Answer],
    done: Callable[[str, Answer], object],
    *,
    shared: Sequence[Path] = (),
    description: str = "work",
    unit: str = "tasks",
    sizes: Mapping[str, float] | None = None,
    already: float = 0.0,
    show: bool = True,
) -> None:
    """Do all tasks, in any order and in parallel.

    Args:
        executor: Executor of the tasks. Workers run in this process's working folder, which they must see.
        tasks: Arguments of each task to do, by its title ("expert 'cooking'").
        work: Function of a module, called with a task's arguments on a worker.
        done: Function called here once for each task, with its title and answer.
        shared: Further folders that all workers must see.
        description: Name of all of it, for the progress shown.
        unit: Unit counted there, plural.
        sizes: Amount each task adds to the progress shown, by title; 1 where None.
        already: Amount done before.
        show: Whether to show progress on stderr.
    Raises:
        ConfigError: A worker lacks one of the folders, or has another version of weftlm.
        WeftError: A task's error, which ends all of them; or a worker died and its task was given up.
    """
    sizes = dict.fromkeys(tasks, 1.0) if sizes is None else sizes
    place, folders = Path.cwd(), [path.resolve() for path in shared]
    with ProgressBar(description, already + sum(sizes.values()), unit=unit, done=already, enabled=show) as bar:
        futures = {
            executor.submit(_on_worker, __version__, place, folders, work, arguments): title
            for title, arguments in tasks.items()
        }
        try:
            for future in as_completed(futures):
                title = futures[future]
                try:
                    answer = future.result()
                except BrokenExecutor as error:
                    raise WeftError(
                        f"{title}: its worker died ({reason(error)}); where memory is short, let fewer run at the "
                        "same time. What is finished is kept: run again"
                    ) from error
                done(title, answer)
                bar.advance(sizes[title])
        except interrupt.Stopped:
            interrupt.end_children()
            raise
        finally:
            for future in futures:
                future.cancel()


def processes(count: int) -> ProcessPoolExecutor:
    """An executor of new processes on this machine, each with its share of the cores and an accelerator in turn."""
    context = get_context("spawn")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slot = context.Value("i", int(os.environ.get("LOCAL_RANK", "0")) * count)
    return ProcessPoolExecutor(count, context, _start_process, (slot, max(1, cores // count)))


def _start_process(slot: Any, threads: int) -> None:
    """Set up a process, before torch is imported in it: no process group, its threads, plain progress, its device."""
    for name in _GROUP:
        os.environ.pop(name, None)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["TERM"] = "dumb"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # between tasks; a task stops at its next safe point
    with slot.get_lock():
        number, slot.value = slot.value, slot.value + 1
    import torch  # noqa: PLC0415  (reads the environment when it is imported)

    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def keep(key: str, make: Callable[[], Kept]) -> Kept:
    """What a worker loads for its first task and keeps for those that follow; another key drops it."""
    if key not in _kept:
        _kept.clear()
        _kept[key] = make()
    kept: Kept = _kept[key]
    return kept


_kept: dict[str, Any] = {}


def new_key() -> str:
    """A fresh key for `keep`."""
    return secrets.token_hex(8)


def _on_worker(
    version: str, place: Path, shared: Sequence[Path], work: Callable[..., Answer], arguments: tuple[Any, ...]
) -> Answer:
    """Do a task, if this worker has the same weftlm and sees the folders."""
    here = socket.gethostname()
    if version != __version__:
        raise ConfigError(
            f"{here} has weftlm {__version__} and the command weftlm {version}; install the same version everywhere"
        )
    for folder in (place, *shared):
        if not folder.exists():
            raise ConfigError(
                f"{folder} is not there on {here}; put the working folder, the run folder, the data, the base and the "
                "experts on a disk that all machines share, under one path"
            )
    os.chdir(place)
    with interrupt.handled():
        return work(*arguments)

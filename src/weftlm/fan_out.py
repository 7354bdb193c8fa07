"""Independent units of work over the machines of a Ray cluster: each done at least once, and counted exactly once.

A worker may die at any moment, also after its unit was done and before anybody heard of it. So a unit must be one that
may be done twice: it depends on its arguments alone, and what it writes appears whole, under a name that depends on
nothing else. `fan_out` gives a unit whose worker died to another worker, and takes one answer of each.

Ray is imported when units are handed out, never before; the extra `ray` brings it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import os
import secrets
import socket
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from weftlm import __version__
from weftlm.errors import ConfigError, WeftError, install_hint, reason
from weftlm.progress import progress

RETRIES = 3
"""How often a unit is given to another worker after its own died."""

_IN_FLIGHT = 256
"""Units handed over at once; what a larger cluster does beyond that waits here."""
_log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Kept = TypeVar("Kept")


@dataclass(frozen=True, eq=False)
class Task:
    """A unit of work.

    Attributes:
        title: what it is, for messages: "expert 'cooking'".
        arguments: of the work function; what it does depends on nothing else.
        size: what it adds to the progress shown.
    """

    title: str
    arguments: tuple[Any, ...]
    size: float = 1.0


@dataclass(frozen=True)
class _Sign:
    """By which a worker knows that it sees the same folder: a token's content, or the digest of a listing."""

    folder: str
    token: str | None
    content: str


@dataclass(frozen=True)
class _Setting:
    """What every worker must find, and where it works."""

    place: str
    signs: tuple[_Sign, ...]
    version: str
    gpus: bool


@dataclass(frozen=True, eq=False)
class _Far(Generic[Answer]):
    """The work function and its setting, sent once."""

    work: Callable[..., Answer]
    setting: _Setting


def fan_out(
    tasks: Sequence[Task],
    work: Callable[..., Answer],
    done: Callable[[Task, Answer], None],
    *,
    shared: Sequence[Path] = (),
    gpus: float = 0.0,
    cpus: int = 1,
    retries: int = RETRIES,
    description: str = "work",
    unit: str = "tasks",
    already: float = 0.0,
    show: bool = True,
) -> None:
    """Do all units, in any order and in parallel.

    Workers work in this process's working folder, which they must see, as they must the `shared` folders. They keep
    what `keep` gives them, on a GPU too, until this process leaves the `cluster`.

    Args:
        tasks: the units; those that are done already are not among them.
        work: called with a unit's arguments on some machine; a function of a module that is installed there.
        done: told here of each unit and its answer, once, whatever was done twice.
        shared: folders that all machines must share.
        gpus: of each unit; 0 hides them from it.
        cpus: cores of each unit; its OMP_NUM_THREADS unless that is set.
        retries: other workers that a unit is given to when its own dies.
        description: of all of it, for the progress shown.
        unit: what is counted there, plural.
        already: what is done of it before.
        show: progress on stderr.
    Raises:
        ConfigError: as `cluster`, or a worker sees other folders or has another version of weftlm.
        WeftError: of a unit, as it was raised, which ends all of them; or a unit's workers died again and again.
    """
    total = already + sum(task.size for task in tasks)
    waiting, running, deaths = deque(tasks), dict[Any, Task](), Counter[Task]()
    with (
        cluster(cpus, gpus) as ray,
        _signs(shared) as signs,
        progress(description, total, unit=unit, enabled=show) as counter,
    ):
        counter.advance(already)
        lost = tuple(
            getattr(ray.exceptions, f"{name}Error")
            for name in ("WorkerCrashed", "NodeDied", "OutOfMemory", "ObjectLost")
        )
        far = ray.put(_Far(work, _Setting(str(Path.cwd()), signs, __version__, gpus > 0)))
        # A worker goes on to the next unit with what it has loaded: Ray ends it after each on a GPU by default.
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=0, max_retries=0, retry_exceptions=False)(_unit)
        try:
            while waiting or running:
                while waiting and len(running) < _IN_FLIGHT:
                    task = waiting.popleft()
                    running[remote.remote(far, *task.arguments)] = task
                for reference in ray.wait(list(running), num_returns=1)[0]:
                    task = running.pop(reference)
                    try:
                        answer = ray.get(reference)
                    except lost as error:
                        deaths[task] += 1
                        _tell_of_death(task, deaths[task], retries, error)
                        waiting.appendleft(task)
                        continue
                    except ray.exceptions.RayTaskError as error:
                        if isinstance(error.cause, WeftError | OSError):
                            raise error.cause from None
                        raise
                    done(task, answer)
                    counter.advance(task.size)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def keep(key: str, make: Callable[[], Kept]) -> Kept:
    """What a worker loads for its first unit and has at hand for those that follow; one thing at a time.

    Args:
        key: of the thing; another key drops what was kept before.
        make: loads it.
    """
    if key not in _kept:
        _kept.clear()
        _kept[key] = make()
    kept: Kept = _kept[key]
    return kept


_kept: dict[str, Any] = {}


def new_key() -> str:
    """A key for `keep` that nobody has had before."""
    return secrets.token_hex(8)


# -- the cluster --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster(cpus: int = 1, gpus: float = 0.0) -> Iterator[Any]:
    """Ray, connected to the cluster `ray.init` was called for, or to another.

    That is the one of RAY_ADDRESS, else the one this machine is part of, else one that is started over this machine
    alone. A connection made here ends here; within another `cluster`, nothing is connected. What Ray prints goes to
    stderr meanwhile: stdout is for results.

    Args:
        cpus: cores that a unit will ask for.
        gpus: GPUs, likewise.
    Raises:
        ConfigError: Ray is not installed, RAY_ADDRESS does not answer, this machine alone has not what a unit asks for,
            or this is one of several processes of torchrun.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("this is one of several processes of torchrun; hand work to Ray from a single process")
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            f"work over machines needs Ray, which cannot be imported ({reason(error)}); {install_hint('ray')}, or use "
            "torchrun over processes"
        ) from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        alone = False
        if not ray.is_initialized():
            stack.callback(ray.shutdown)
            alone = _connect(ray)
        for kind, asked in (("CPU", cpus), ("GPU", gpus)):
            most = max((node["Resources"].get(kind, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
            if asked > most and alone:
                raise ConfigError(
                    f"each task asks for {asked:g} {kind}s and this machine has {most:g}; ask for less, or connect to "
                    "a cluster that has them (RAY_ADDRESS)"
                )
            if asked > most:
                _log.warning("tasks ask for %g %ss, machines have %g at most: waiting for another", asked, kind, most)
        yield ray


def _connect(ray: Any) -> bool:
    """Connect to a running cluster, or else start one over this machine alone; whether it was the latter."""
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    refused = getattr(ray.exceptions, "AuthenticationError", ConnectionError)  # newer than the oldest Ray allowed
    try:
        ray.init(address="auto", **quiet)
    except (ConnectionError, refused) as error:
        address = os.environ.get("RAY_ADDRESS")
        if address is not None:
            raise ConfigError(
                f"no Ray cluster lets this process in at RAY_ADDRESS {address!r}; start one (ray start --head), set "
                "RAY_AUTH_MODE=token where it asks for a token, or unset RAY_ADDRESS to use this machine alone"
            ) from error
    else:
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", include_dashboard=False, **quiet)
    return True


def _tell_of_death(task: Task, deaths: int, retries: int, error: Exception) -> None:
    reason = type(error).__name__
    if deaths > retries:
        raise WeftError(
            f"{task.title}: its worker died {deaths} times ({reason}); where memory is short, let fewer work at once; "
            "what is finished is kept: run again"
        ) from error
    _log.warning("%s: its worker died (%s); another one takes over", task.title, reason)


@contextlib.contextmanager
def _signs(folders: Sequence[Path]) -> Iterator[tuple[_Sign, ...]]:
    """Put a token into every folder; one that cannot be written to is known by its listing."""
    token = f".weftlm-shared-{secrets.token_hex(8)}"
    signs: list[_Sign] = []
    try:
        for folder in dict.fromkeys(path.resolve() for path in folders):
            content = secrets.token_hex(16)
            try:
                (folder / token).write_text(content, encoding="utf-8")
            except OSError:
                signs.append(_Sign(str(folder), None, _listing(folder)))
            else:
                signs.append(_Sign(str(folder), token, content))
        yield tuple(signs)
    finally:
        for sign in signs:
            if sign.token is not None:
                with contextlib.suppress(OSError):
                    (Path(sign.folder) / sign.token).unlink(missing_ok=True)


def _listing(folder: Path) -> str:
    """Digest of the names, sizes and times of a folder's files."""
    with os.scandir(folder) as entries:
        facts = sorted((entry.name, entry.stat().st_size, int(entry.stat().st_mtime)) for entry in entries)
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


# -- on a worker --------------------------------------------------------------------------------------------------


def _unit(far: _Far[Answer], *arguments: Any) -> Answer:
    setting = far.setting
    if setting.version != __version__:
        raise ConfigError(
            f"{socket.gethostname()} has weftlm {__version__} and the command weftlm {setting.version}; install the "
            "same version on all machines"
        )
    if not setting.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        os.chdir(setting.place)
    except OSError as error:
        raise ConfigError(
            f"{socket.gethostname()} does not see the folder {setting.place}, in which the command was started; start "
            "it in a folder that all machines share"
        ) from error
    for sign in setting.signs:
        _check_sign(sign)
    return far.work(*arguments)


def _check_sign(sign: _Sign) -> None:
    folder = Path(sign.folder)
    try:
        found = _listing(folder) if sign.token is None else (folder / sign.token).read_text(encoding="utf-8")
    except OSError:
        found = None
    if found != sign.content:
        what = "is not there" if not folder.is_dir() else "is another folder than the command sees"
        raise ConfigError(
            f"on {socket.gethostname()} {folder} {what}; put the run folder, the data, the base and the experts on a "
            "disk that all machines share, under one path"
        )

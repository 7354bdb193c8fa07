"""Ray as an executor: `with ray_executor(gpus=1) as executor: train_experts(recipe, executor=executor)`.

Ray gives a task whose worker dies to another worker. The extra `ray` brings it; it is imported on use.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

from weftlm.errors import ConfigError, WeftError, install_hint, reason

log = logging.getLogger(__name__)

RETRIES = 3
"""How often Ray gives a task to another worker after its own died."""


class RayExecutor(Executor):
    """Tasks on a connected Ray cluster.

    Args:
        cpus: Cores of each task; its OMP_NUM_THREADS unless that is set.
        gpus: GPUs of each task; 0 hides them from it.
        retries: Number of times a task is given to another worker after its own died.
    """

    def __init__(self, cpus: int = 1, gpus: float = 0.0, retries: int = RETRIES) -> None:
        self._ray, self._retries = importlib.import_module("ray"), retries
        # A worker goes on to the next task with what it has loaded: Ray ends it after each on a GPU by default.
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_calls": 0, "max_retries": retries}
        self._run, self._hides_gpus = self._ray.remote(**options, retry_exceptions=False)(_run), gpus == 0
        self._futures: set[Future[Any]] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `concurrent.futures.Executor.submit`; a future that is cancelled ends its task on the worker."""
        reference = self._run.remote(fn, args, kwargs, self._hides_gpus)
        future: Future[Any] = Future()
        self._futures.add(future)
        future.add_done_callback(lambda future: self._ray.cancel(reference, force=True) if future.cancelled() else None)
        reference.future().add_done_callback(lambda found: self._pass_on(found, future))
        return future

    def _pass_on(self, found: Future[Any], future: Future[Any]) -> None:
        """The answer of a task, or its error as it was raised there."""
        if not future.set_running_or_notify_cancel():
            return
        error = found.exception()
        if error is None:
            future.set_result(found.result())
        elif isinstance(error, self._ray.exceptions.RayTaskError):
            cause = getattr(error, "cause", None)
            future.set_exception(cause if isinstance(cause, WeftError | OSError) else error)
        else:
            future.set_exception(BrokenExecutor(f"{type(error).__name__} after {self._retries} retries"))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `concurrent.futures.Executor.shutdown`; the cluster stays as it is."""
        for future in self._futures:
            if cancel_futures:
                future.cancel()
            elif wait and not future.cancelled():
                future.exception()
        self._futures.clear()


def _run(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], hides_gpus: bool) -> Any:
    if hides_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return fn(*args, **kwargs)


@contextmanager
def ray_executor(cpus: int = 1, gpus: float = 0.0) -> Iterator[RayExecutor]:
    """An executor over the cluster `ray.init` was called for, or over another.

    That is the one of RAY_ADDRESS, else the one this machine is part of, else one that is started over this machine
    alone. A connection made here ends here. What Ray prints goes to stderr meanwhile: stdout is for results.

    Args:
        cpus: Cores of each task.
        gpus: GPUs of each task; 0 hides them from it.
    Raises:
        ConfigError: Ray is not installed, RAY_ADDRESS does not answer, this machine alone has not what a task asks for,
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
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        alone = False
        if not ray.is_initialized():
            stack.callback(ray.shutdown)
            alone = _connect(ray)
        asked = {"CPU": cpus, "GPU": gpus}
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(has.get(kind, 0) >= count for kind, count in asked.items()) for has in machines):
            said = f"each task asks for {cpus} CPUs and {gpus:g} GPUs, which"
            if alone:
                raise ConfigError(
                    f"{said} this machine does not have; ask for less, or connect to a cluster that has them "
                    "(RAY_ADDRESS)"
                )
            log.warning("%s no machine of the cluster has: waiting for another to join", said)
        executor = RayExecutor(cpus, gpus)
        stack.callback(executor.shutdown, cancel_futures=True)
        yield executor


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

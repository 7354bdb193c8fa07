"""One model, many requests at once: a queue, a worker thread, and continuous batching.

A turn of the worker takes new requests into free places, reads one piece of one prompt, and gives every running request
its next token. Requests join and leave between turns. What a request gets does not depend on what else runs, bit for
bit: prompts are read alone, in pieces that depend on nothing else; the passes that several requests share are arranged
so that none of their numbers reaches another's (see `ragged.py`); draws are each request's own.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from weftlm.errors import ConfigError
from weftlm.models.prompted import is_encoder_decoder
from weftlm.models.stepping import stepping_of
from weftlm.pipeline.any_model import OpenModel
from weftlm.serving.checking import check_request, check_timeout
from weftlm.serving.detokenise import AnswerText
from weftlm.serving.drawing import Draw
from weftlm.serving.request import Finished, FinishReason, Load, QueueFullError, Sampling, Token
from weftlm.serving.serve_config import EngineConfig
from weftlm.serving.stepping import Stepper
from weftlm.serving.trial import stepper_for

log = logging.getLogger(__name__)

T = TypeVar("T")

SMOOTHING = 0.1
"""Weight of the newest turn in the mean time of a turn."""
SHORTEST_WAIT_S, LONGEST_WAIT_S = 0.1, 60.0
"""Between which a guess at when there is room lies."""


class Request:
    """A request on its way through an engine, and its asker's `Ticket`."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        text: AnswerText,
        deadline: float,
        leave: Callable[[Request], None],
        on_event: Callable[[], None] | None,
    ) -> None:
        self.prompt = tuple(prompt)
        self.sampling = sampling
        self.text = text
        self.deadline = deadline
        self.draw = Draw(sampling)
        self.state: Any = None
        self.read = 0  # tokens of the prompt
        self.last = 0  # token generated
        self.generated = 0
        self.cancelled = False
        self._leave = leave
        self._on_event = on_event
        self._events: queue.SimpleQueue[Token | Finished] = queue.SimpleQueue()
        self._end: Finished | None = None

    # -- the asker's side ---------------------------------------------------------------------------------------

    def next(self, timeout_s: float | None = None) -> Token | Finished:
        """See `Ticket`; after `Finished`, the same again."""
        if self._end is not None:
            return self._end
        try:
            event = self._events.get_nowait() if timeout_s == 0 else self._events.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"no token came within {timeout_s} s; the request goes on") from None
        if isinstance(event, Finished):
            self._end = event
            self._events.put(event)  # for another thread that waits for the same request
        return event

    def cancel(self) -> None:
        """See `Ticket`."""
        self._leave(self)

    # -- the worker's side --------------------------------------------------------------------------------------

    def tell(self, event: Token | Finished) -> None:
        """Pass an event on to the asker; no lock is held."""
        self._events.put(event)
        if self._on_event is None:
            return
        try:
            self._on_event()
        except Exception:  # a listener's fault must not stop the engine for everybody
            log.exception("whoever listens to a request failed")


class Engine:
    """One model, many requests at once; see the top of this file. A `Generator` of `request.py`.

    The end-of-text token (the tokenizer's, and those of the model's generation settings) ends an answer with the reason
    `stop` and is not told as a `Token`, unless a request ignores it. Time limits count from `submit`, waiting included.
    An exception in a pass ends the requests of that pass with the reason `error`; the others go on.

    Args:
        opened: the model; only the engine's worker may run it until `close`, see `call`.
        config: how it is shared.
        clock: seconds from any start, for time limits.
    Raises:
        ConfigError: the model has an encoder.
    """

    def __init__(
        self,
        opened: OpenModel,
        config: EngineConfig = EngineConfig(),  # noqa: B008 (frozen)
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if is_encoder_decoder(opened.model):
            raise ConfigError(f"{opened.path} is an encoder-decoder model; an engine serves decoder-only models")
        self.opened = opened
        self.config = config
        self._clock = clock
        self._vocab_size = _vocab_size(opened)
        self._end_ids = _end_ids(opened)
        self._piece = config.prompt_piece_tokens if stepping_of(opened.model).in_pieces else None
        self._stepper: Stepper = stepper_for(opened, config.slots, batching=config.batching)
        self._changed = threading.Condition()
        # Below: read and written with `_changed` held.
        self._waiting: deque[Request] = deque()
        self._reading: list[Request] = []
        self._running: list[Request] = []
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = False
        self._generated = self._prompted = 0
        self._finished: Counter[str] = Counter(dict.fromkeys(get_args(FinishReason), 0))
        self._turn_s: float | None = None
        self._worker = threading.Thread(target=self._work, name="weftlm-engine", daemon=True)
        self._worker.start()

    # -- asking -------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        *,
        timeout_s: float | None = None,
        on_event: Callable[[], None] | None = None,
    ) -> Request:
        """See `Generator`.

        Args:
            prompt_ids: to continue.
            sampling: how tokens are drawn.
            timeout_s: from now, the wait included; None for the engine's own limit, `EngineConfig.timeout_seconds`. No
                limit at all is to be had from an engine whose own is None.
            on_event: called after every event.
        Raises:
            QueueFullError: as many run and wait as may.
            ConfigError: the request is out of range (see `check_request`), or the engine is closed.
        """
        check_request(prompt_ids, sampling, self._vocab_size, self.opened.max_length)
        check_timeout(timeout_s)
        if timeout_s is None:
            timeout_s = self.config.timeout_seconds
        deadline = math.inf if timeout_s is None else self._clock() + timeout_s
        text = AnswerText(self.opened.tokenizer.decode, sampling.stop, prompt_ids)
        request = Request(prompt_ids, sampling, text, deadline, self._leave, on_event)
        with self._changed:
            if self._closing:
                raise ConfigError("the engine is closed and takes no more requests; make another")
            inside = len(self._waiting) + len(self._reading) + len(self._running)
            if inside >= self.config.slots + self.config.max_waiting:
                raise QueueFullError(len(self._waiting), self._wait_s())
            self._waiting.append(request)
            self._changed.notify()
        return request

    def load(self) -> Load:
        """See `Generator`."""
        with self._changed:
            return Load(
                running=len(self._reading) + len(self._running),
                waiting=len(self._waiting),
                generated_tokens=self._generated,
                prompt_tokens=self._prompted,
                finished=dict(self._finished),
            )

    def call(self, work: Callable[[], T]) -> T:
        """Do something with the model between two turns, on the worker, and wait for it.

        For whatever else runs the model while it is served: a model in the middle of a pass must not be given another.

        Args:
            work: called without arguments; what it returns or raises comes back from here.
        Raises:
            ConfigError: the engine is closed.
        """
        if threading.current_thread() is self._worker:
            return work()
        done: Future[T] = Future()
        with self._changed:
            if self._closing:
                raise ConfigError("the engine is closed; run the model itself")
            self._jobs.append((work, done))
            self._changed.notify()
        return done.result()

    def close(self) -> None:
        """See `Generator`; waits for the turn under way. Closing twice is closing once."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._worker:
            self._worker.join()

    def _leave(self, request: Request) -> None:
        with self._changed:
            request.cancelled = True
            waits = request in self._waiting
            if waits:
                self._waiting.remove(request)
        if waits:
            self._end(request, "cancelled")

    def _wait_s(self) -> float:
        """A guess at when a place will be free: the turns the nearest end is away at most, at the mean time of one."""
        if self._turn_s is None:
            return 1.0
        turns = min((each.sampling.max_tokens - each.generated for each in self._running), default=1)
        return min(max(turns * self._turn_s, SHORTEST_WAIT_S), LONGEST_WAIT_S)

    # -- working ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        message = ""
        try:
            while self._turn():
                pass
        except BaseException as error:  # whatever stops the worker, nobody is left waiting for it
            log.exception("the engine has stopped")
            message = f"the engine has stopped: {type(error).__name__}: {error}"
        with self._changed:
            self._closing = True
            left = [*self._reading, *self._running, *self._waiting]
            jobs = list(self._jobs)
            for held in (self._reading, self._running, self._waiting, self._jobs):
                held.clear()
        for request in left:
            self._end(request, "error" if message else "cancelled", message)
        for _, done in jobs:
            done.set_exception(ConfigError("the engine is closed; run the model itself"))
        self._stepper.close()

    def _turn(self) -> bool:
        """Everything between two waits; False when there shall be no more."""
        with self._changed:
            while not (self._closing or self._jobs or self._waiting or self._reading or self._running):
                self._changed.wait()
            if self._closing:
                return False
            jobs = list(self._jobs)
            self._jobs.clear()
            gone = self._sweep()
        for request, reason in gone:
            self._end(request, reason)
        for work, done in jobs:
            _do(work, done)
        started = time.perf_counter()
        with torch.inference_mode():
            if self._reading:
                self._read(self._reading[0])
            together = self._stepper.together
            for requests in [list(self._running)] if together else [[request] for request in self._running]:
                if requests:
                    self._step(requests)
        spent = time.perf_counter() - started
        with self._changed:
            before = spent if self._turn_s is None else self._turn_s
            self._turn_s = before + SMOOTHING * (spent - before)
        return True

    def _sweep(self) -> list[tuple[Request, FinishReason]]:
        """Take out requests that were given up or took too long, and give free places to those that wait."""
        now = self._clock()
        gone: list[tuple[Request, FinishReason]] = []
        for held in (self._reading, self._running, self._waiting):
            for request in [each for each in held if each.cancelled or now >= each.deadline]:
                held.remove(request)
                gone.append((request, "cancelled" if request.cancelled else "timeout"))
        while self._waiting and len(self._reading) + len(self._running) < self.config.slots:
            self._reading.append(self._waiting.popleft())
        return gone

    def _read(self, request: Request) -> None:
        """One piece of a prompt; after the last, the first token."""
        first, last = request.read, self._piece_end(request)
        try:
            if request.state is None:
                request.state = self._stepper.begin()
            logits_V = self._stepper.read(request.state, request.prompt[first:last])
        except Exception as error:
            log.exception("a request ended by an error")
            self._failed([request], error)
            return
        with self._changed:
            self._prompted += last - first
            request.read = last
            if last == len(request.prompt):
                self._reading.remove(request)
                self._running.append(request)
        if last == len(request.prompt):
            self._answer(request, logits_V)

    def _piece_end(self, request: Request) -> int:
        """Pieces depend on the prompt alone; the last is not of a single token, which some models read otherwise."""
        total = len(request.prompt)
        if self._piece is None or request.read + self._piece + 1 >= total:
            return total
        return request.read + self._piece

    def _step(self, requests: list[Request]) -> None:
        """The next token of some running requests."""
        try:
            logits = self._stepper.step([each.state for each in requests], [each.last for each in requests])
        except Exception as error:
            log.exception("%d requests ended by an error", len(requests))
            self._failed(requests, error)
            return
        for request, logits_V in zip(requests, logits, strict=True):
            self._answer(request, logits_V)

    def _answer(self, request: Request, logits_V: Tensor) -> None:
        """Draw a token and tell it; end the request where it ends."""
        try:
            drawn = request.draw(logits_V)
            if drawn.id in self._end_ids and not request.sampling.ignore_eos:
                self._done(request, "stop")
                return
            text = request.text.push(drawn.id)
        except Exception as error:
            log.exception("a request ended by an error")
            self._failed([request], error)
            return
        request.last = drawn.id
        request.generated += 1
        request.tell(Token(drawn.id, text, drawn.logprob, drawn.top))
        with self._changed:
            self._generated += 1
        if request.text.stopped:
            self._done(request, "stop")
        elif request.generated == request.sampling.max_tokens:
            self._done(request, "length")

    def _failed(self, requests: list[Request], error: Exception) -> None:
        for request in requests:
            self._done(request, "error", f"{type(error).__name__}: {error}")

    def _done(self, request: Request, reason: FinishReason, message: str = "") -> None:
        with self._changed:
            for held in (self._reading, self._running):
                if request in held:
                    held.remove(request)
        self._end(request, reason, message)

    def _end(self, request: Request, reason: FinishReason, message: str = "") -> None:
        """Forget the caches of a request that is in no list any more, and tell its end. Called without the lock."""
        request.state = None
        try:
            text = request.text.finish()
        except Exception as error:
            log.exception("the end of an answer cannot be decoded")
            text, reason, message = "", "error", message or f"{type(error).__name__}: {error}"
        if request.text.stopped and reason == "length":
            reason = "stop"
        with self._changed:
            self._finished[reason] += 1
        request.tell(Finished(reason, text, message))


def _do(work: Callable[[], T], done: Future[T]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        done.set_exception(error)
        if not isinstance(error, Exception):
            raise
    else:
        done.set_result(result)


def _vocab_size(opened: OpenModel) -> int:
    if opened.kind == "gated":
        return int(opened.model.vocab_size)
    return int(opened.model.get_input_embeddings().weight.shape[0])


def _end_ids(opened: OpenModel) -> frozenset[int]:
    """The tokenizer's end-of-text token and what the model's generation settings name."""
    named = getattr(getattr(opened.model, "generation_config", None), "eos_token_id", None)
    ids = [] if named is None else named if isinstance(named, list | tuple) else [named]
    return frozenset([opened.tokenizer.eos_id, *map(int, ids)])

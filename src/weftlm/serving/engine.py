"""One model, many requests at once: a queue, a worker thread, and continuous batching.

A turn of the worker takes waiting requests into free batch slots, reads one piece of one prompt (prefill), and gives
every request whose prompt is read its next token (decode). Requests join and leave between turns. What a request gets
does not depend on what else runs, bit for bit: prompts are read alone, in pieces that depend on nothing else; passes
that several requests share are arranged so that none of their numbers reaches another's (see `ragged.py`); draws are
each request's own.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic, perf_counter

import torch
from torch import Tensor

from weftlm.models.open import stepping_of
from weftlm.pipeline.any_model import OpenModel
from weftlm.serving.detokenise import AnswerText
from weftlm.serving.request import (
    Draw,
    EngineClosedError,
    Event,
    Finished,
    FinishReason,
    PromptError,
    QueueFullError,
    Sampling,
    Token,
)
from weftlm.serving.stepping import ModelState, OneByOne, stepper_for

log = logging.getLogger(__name__)

PREFILL_TOKENS = 512
"""Tokens of a prompt read between two tokens of the running requests."""


class RequestState:
    """A request in an engine, and its answer as it grows.

    Attributes:
        tokens: Tokens so far.
        finished: How it ended; None while it goes on.
        times: When it was submitted, and when the first and the last token came; seconds from any start.
        read: Number of tokens of the prompt read so far.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        decode: Callable[[Sequence[int]], str],
        deadline: float,
        send: Callable[[Event], None],
    ) -> None:
        self.prompt = tuple(prompt)
        self.sampling = sampling
        self.deadline = deadline
        self.tokens: list[Token] = []
        self.finished: Finished | None = None
        self.times = (perf_counter(), 0.0, 0.0)
        self.decoder = AnswerText(decode, sampling.stop, prompt)
        self.draw = Draw(sampling)
        self.state = ModelState()
        self.read = 0
        self.cancelled = False
        self._send = send

    @property
    def decoding(self) -> bool:
        """Whether the prompt is read."""
        return self.read == len(self.prompt)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(token.text for token in self.tokens) + (self.finished.text if self.finished is not None else "")

    def cancel(self) -> None:
        """Give the request up, which frees its batch slot at the next turn; harmless when finished."""
        self.cancelled = True

    def record(self, event: Event) -> None:
        """Keep an event and send it."""
        if isinstance(event, Token):
            now = perf_counter()
            self.times = self.times[0], self.times[1] if self.tokens else now, now
            self.tokens.append(event)
        else:
            self.finished = event
        try:
            self._send(event)
        except Exception:  # a fault of one receiver must not stop the engine for the others
            log.exception("the receiver of a request's events failed")


class Engine:
    """One model, many requests at once; see the top of this file.

    The end-of-text token (the tokenizer's, and those of the model's generation settings) ends an answer with the reason
    `stop` and is not sent as a `Token`, unless a request ignores it. Time limits count from `submit`, waiting included.
    An exception in a pass ends the requests of that pass with the reason `error`; the others go on.

    Nothing else may run the model until `close`. The limits are those of `ServeConfig`; a timeout of None is no limit.
    """

    def __init__(
        self, opened: OpenModel, *, slots: int = 8, max_waiting: int = 64, timeout_seconds: float | None = 120.0
    ) -> None:
        self.opened = opened
        self._slots, self._places = slots, slots + max_waiting
        self._timeout_seconds = math.inf if timeout_seconds is None else timeout_seconds
        ends = getattr(getattr(opened.model, "generation_config", None), "eos_token_id", None)
        self._end_ids = {opened.tokenizer.eos_id, *([ends] if isinstance(ends, int) else ends or ())}
        self._in_pieces = stepping_of(opened.model).in_pieces
        self._stepper: OneByOne = stepper_for(opened, slots)
        self._changed = threading.Condition()
        self._waiting: deque[RequestState] = deque()  # changed with `_changed` held
        self._active: list[RequestState] = []  # changed by the worker alone
        self._closing = False
        self._worker = threading.Thread(target=self._work, name="weftlm-engine", daemon=True)
        self._worker.start()

    @property
    def running(self) -> int:
        """Number of requests in batch slots."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._waiting)

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        send: Callable[[Event], None],
        *,
        timeout_s: float | None = None,
    ) -> RequestState:
        """Queue a request; returns at once.

        Args:
            prompt_ids: Token ids to continue; at least one.
            sampling: How tokens are drawn.
            send: Called with every token and with `Finished` at the end, from the worker's thread; it must not block.
            timeout_s: Time limit in seconds, waiting included; None for the engine's own.
        Raises:
            QueueFullError: As many requests run and wait as may.
            PromptError: The prompt is empty, too long with max_tokens, or holds a number that is no token id.
            EngineClosedError: `close` was called.
        """
        self.check(prompt_ids, sampling.max_tokens)
        deadline = monotonic() + (self._timeout_seconds if timeout_s is None else timeout_s)
        request = RequestState(prompt_ids, sampling, self.opened.tokenizer.decode, deadline, send)
        with self._changed:
            if self._closing:
                raise EngineClosedError("the engine is closed and takes no more requests; make another")
            if self.running + self.waiting >= self._places:
                raise QueueFullError(f"{self.waiting} requests wait already")
            self._waiting.append(request)
            self._changed.notify()
        return request

    def check(self, prompt_ids: Sequence[int], max_tokens: int) -> None:
        """Check a prompt against the model; see `submit`."""
        if not prompt_ids:
            raise PromptError("the prompt is empty; give at least one token")
        total, most = len(prompt_ids) + max_tokens, self.opened.max_length
        if most is not None and total > most:
            raise PromptError(
                f"a prompt of {len(prompt_ids):,} tokens and max_tokens {max_tokens:,} make {total:,}; the model reads "
                f"{most:,} tokens at most: shorten the prompt or lower max_tokens",
                "context_length_exceeded",
            )
        vocab_size = int(self.opened.model.config.vocab_size)
        for token in (min(prompt_ids), max(prompt_ids)):
            if not 0 <= token < vocab_size:
                raise PromptError(f"the prompt holds {token}, which is no token id; ids go from 0 to {vocab_size - 1}")

    def close(self) -> None:
        """End what runs (`cancelled`) after the turn under way, and stop. Closing twice is closing once.

        It returns when the worker has ended; called by a `send`, on the worker's own thread, at once.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._worker:
            self._worker.join()

    # -- the worker's thread ------------------------------------------------------------------------------------

    def _work(self) -> None:
        message = ""
        try:
            while self._wait():
                self._turn()
        except BaseException as error:  # whatever stops the worker, no client is left waiting
            log.exception("the engine has stopped")
            message = f"the engine has stopped: {type(error).__name__}: {error}"
        with self._changed:
            self._closing = True
            left = [*self._active, *self._waiting]
            self._waiting.clear()
        for request in left:
            self._end(request, "error" if message else "cancelled", message)
        self._stepper.close()

    def _wait(self) -> bool:
        """Wait for requests; False when the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self._active)
            return not self._closing

    def _turn(self) -> None:
        """A piece of a prompt, and a token of every running request."""
        self._sweep()
        with torch.inference_mode():
            prefill = next((request for request in self._active if not request.decoding), None)
            if prefill is not None:
                self._read(prefill)
            decode = [request for request in self._active if request.decoding]
            for requests in [decode] if self._stepper.together else [[request] for request in decode]:
                if requests:
                    self._step(requests)

    def _sweep(self) -> None:
        """End requests that are cancelled or late, and fill free batch slots from the queue."""
        now = monotonic()
        with self._changed:
            gone = [each for each in (*self._active, *self._waiting) if each.cancelled or now >= each.deadline]
            self._waiting = deque(each for each in self._waiting if each not in gone)
            self._active = [each for each in self._active if each not in gone]
            while self._waiting and len(self._active) < self._slots:
                self._active.append(self._waiting.popleft())
        for request in gone:
            self._end(request, "cancelled" if request.cancelled else "timeout")

    def _read(self, request: RequestState) -> None:
        """One piece of a prompt; after the last, the first token.

        Pieces depend on the prompt alone; the last is not of a single token, which some models read otherwise.
        """
        first, last = request.read, len(request.prompt)
        if self._in_pieces and first + PREFILL_TOKENS + 1 < last:
            last = first + PREFILL_TOKENS
        with self._ending_on_error([request]):
            logits_V = self._stepper.read(request.state, request.prompt[first:last])
            request.read = last
            if request.decoding:
                self._answer(request, logits_V)

    def _step(self, requests: list[RequestState]) -> None:
        """The next token of requests that share a pass."""
        logits: Sequence[Tensor] = ()
        with self._ending_on_error(requests):
            logits = self._stepper.step([each.state for each in requests], [each.tokens[-1].id for each in requests])
        for request, logits_V in zip(requests, logits, strict=False):
            with self._ending_on_error([request]):
                self._answer(request, logits_V)

    def _answer(self, request: RequestState, logits_V: Tensor) -> None:
        """Draw a token and send it; end the request where it ends."""
        drawn = request.draw(logits_V)
        if drawn.id in self._end_ids and not request.sampling.ignore_eos:
            self._end(request, "stop")
            return
        request.record(replace(drawn, text=request.decoder.push(drawn.id)))
        if request.decoder.stopped:
            self._end(request, "stop")
        elif len(request.tokens) == request.sampling.max_tokens:
            self._end(request, "length")

    @contextmanager
    def _ending_on_error(self, requests: list[RequestState]) -> Iterator[None]:
        """An exception inside ends these requests and goes no further."""
        try:
            yield
        except Exception as error:
            log.exception("%d requests ended by an error", len(requests))
            for request in requests:
                self._end(request, "error", f"{type(error).__name__}: {error}")

    def _end(self, request: RequestState, reason: FinishReason, message: str = "") -> None:
        """Free a request's batch slot and cache, and send its end."""
        if request in self._active:
            self._active.remove(request)
        request.state = ModelState()
        try:
            text = request.decoder.finish()
        except Exception as error:
            log.exception("the end of an answer cannot be decoded")
            text, reason, message = "", "error", message or f"{type(error).__name__}: {error}"
        if request.decoder.stopped and reason == "length":
            reason = "stop"
        request.record(Finished(reason, text, message))

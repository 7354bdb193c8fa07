"""An engine without a model: it answers with what a test scripts, at once or when told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from weftlm.pipeline.any_model import OpenModel
from weftlm.serving.engine import Engine, RequestState
from weftlm.serving.request import Event, Finished, QueueFullError, Sampling, Token

Script = Callable[[Sequence[int], Sampling], Sequence[Event]]


class FakeRequest(RequestState):
    """A request; `say` is the engine's side."""

    def __init__(
        self, prompt: Sequence[int], sampling: Sampling, send: Callable[[Event], None], timeout_s: float | None
    ) -> None:
        super().__init__(prompt, sampling, lambda _: "", 0.0, send)
        self.timeout_s = timeout_s
        self.given_up = threading.Event()

    def say(self, *events: Event) -> None:
        for event in events:
            if self.finished is None:
                self.record(event)

    def cancel(self) -> None:
        self.say(Finished("cancelled"))
        self.given_up.set()


class FakeEngine(Engine):
    """Answers with a script; without one it waits until the test speaks through its requests.

    Attributes:
        requests: All requests, in order.
        places: Number of requests that are let in; None for any number.
    """

    def __init__(self, opened: OpenModel, script: Script | None = None, places: int | None = None) -> None:
        self.opened = opened
        self.script = script
        self.places = places
        self.requests: list[FakeRequest] = []
        self.asked = threading.Semaphore(0)

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        send: Callable[[Event], None],
        *,
        timeout_s: float | None = None,
    ) -> RequestState:
        self.check(prompt_ids, sampling.max_tokens)
        if self.places is not None and self.running >= self.places:
            raise QueueFullError(f"{self.running} requests wait already")
        request = FakeRequest(prompt_ids, sampling, send, timeout_s)
        self.requests.append(request)
        request.say(*(self.script(prompt_ids, sampling) if self.script is not None else ()))
        self.asked.release()
        return request

    def wait_for_request(self) -> FakeRequest:
        """The newest request, once there is one more."""
        assert self.asked.acquire(timeout=10), "no request came"
        return self.requests[-1]

    @property
    def running(self) -> int:
        return sum(request.finished is None for request in self.requests)

    @property
    def waiting(self) -> int:
        return 0

    def close(self) -> None:
        for request in self.requests:
            request.say(Finished("cancelled"))


def words(opened: OpenModel) -> Script:
    """A script: the prompt again and again, token by token, up to `max_tokens`; honours nothing but `logprobs`."""

    def script(prompt_ids: Sequence[int], sampling: Sampling) -> list[Event]:
        said: list[Event] = []
        for place in range(sampling.max_tokens):
            token = prompt_ids[place % len(prompt_ids)]
            text = opened.tokenizer.decode([token])
            if sampling.logprobs is None:
                said.append(Token(token, text))
            else:
                top = tuple((other, -0.5 - other) for other in range(sampling.logprobs))
                said.append(Token(token, text, -0.25, top))
        return [*said, Finished("length")]

    return script

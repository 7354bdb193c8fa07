"""What a weighted sampler does when its weights change and when it is resumed: measured alike for every contestant.

Imports nothing of weftlm, so that it also runs inside a peer's own environment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

BEFORE, AFTER, COMPARED = 20, 100, 20


class Contestant(Protocol):
    """One way to draw batches from a mixture; `tokens_BT1` int64, `domains_B` the domain of each row."""

    def next(self) -> tuple[Tensor, list[int]]: ...

    def set_weights(self, weights: list[float]) -> None:
        """Change the mixture of the coming batches by whatever the library offers."""

    def state(self) -> Any:
        """What a checkpoint would hold."""

    def load(self, state: Any) -> None: ...


def behaviour(make: Callable[[], Contestant], domains: int) -> dict[str, Any]:
    """Change all weight to the last domain after some batches, and resume with and without such a change.

    Returns:
        shares_before: part of each domain in the batches before the change; they should be near the weights.
        batches_until_change: batches after the change that still held other domains; None if that never ended.
        repeated: fraction of the rows after the change that had been delivered before, though no domain was used up.
        resumes: the batches after a resume equal those of the run that went on.
        resumes_after_change: the same, when the weights had changed before the checkpoint.
        resumes_given_new_weights: the same, when the resumed object is told the new weights before it is loaded.
    """
    almost = 1e-9
    last = [almost] * (domains - 1) + [1 - almost * (domains - 1)]
    falling = [2 * (domains - index) / (domains * (domains + 1)) for index in range(domains)]
    contestant = make()
    seen: set[bytes] = set()
    counts = [0] * domains
    for _ in range(BEFORE):
        tokens_BT1, domains_B = contestant.next()
        seen.update(_rows(tokens_BT1))
        for domain in domains_B:
            counts[domain] += 1
    contestant.set_weights(last)
    foreign, repeated, rows = -1, 0, 0
    for index in range(AFTER):
        tokens_BT1, domains_B = contestant.next()
        if any(domain != domains - 1 for domain in domains_B):
            foreign = index
        again = _rows(tokens_BT1)
        repeated += sum(row in seen for row in again)
        rows += len(again)
        if index + 1 == COMPARED:
            early = repeated / rows
    return {
        "shares_before": [count / sum(counts) for count in counts],
        "batches_until_change": foreign + 1 if foreign + 1 < AFTER else None,
        "repeated": early,
        "resumes": _resumes(make),
        "resumes_after_change": _resumes(make, falling),
        "resumes_given_new_weights": _resumes(make, falling, told=True),
    }


def _resumes(make: Callable[[], Contestant], weights: list[float] | None = None, told: bool = False) -> bool:
    contestant = make()
    for _ in range(BEFORE):
        contestant.next()
    if weights is not None:
        contestant.set_weights(weights)
        for _ in range(5):
            contestant.next()
    state = contestant.state()
    expected = [contestant.next()[0] for _ in range(COMPARED)]
    other = make()
    if told and weights is not None:
        other.set_weights(weights)
    other.load(state)
    return all(torch.equal(tokens_BT1, other.next()[0]) for tokens_BT1 in expected)


def _rows(tokens_BT1: Tensor) -> list[bytes]:
    return [row.tobytes() for row in tokens_BT1.numpy()]


def seconds(contestant: Contestant, batches: int) -> float:
    """Time to deliver some batches, each a tensor of the promised type and shape."""
    start = time.perf_counter()
    for _ in range(batches):
        tokens_BT1, domains_B = contestant.next()
    elapsed = time.perf_counter() - start
    if tokens_BT1.dtype != torch.int64 or len(domains_B) != len(tokens_BT1):
        raise TypeError(f"{type(contestant).__name__} delivered {tokens_BT1.dtype} with {len(domains_B)} domains")
    return elapsed

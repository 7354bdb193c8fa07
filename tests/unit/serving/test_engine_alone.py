"""What a request gets beside others is what it gets alone, bit for bit, whatever the others are and when they come."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from support import experts as tiny
from support.asking import PATIENCE_S, Answer, ask, collect, held, requests
from support.gated import mixed_pool
from support.in_memory import gated, plain, routed, sliding

from weftlm.gating.bayes import FixedShareGate
from weftlm.gating.prefix_gate import PrefixGate
from weftlm.pipeline.any_model import OpenModel
from weftlm.serving.engine import Engine
from weftlm.serving.request import Token
from weftlm.serving.serve_config import EngineConfig

MODELS: dict[str, Callable[[], OpenModel]] = {
    "llama": lambda: plain(tiny.llama()),
    "gpt2": lambda: plain(tiny.gpt2()),
    "sliding windows": lambda: plain(sliding()),
    "bfloat16": lambda: plain(tiny.llama().bfloat16()),
    "phatgoose": lambda: routed("phatgoose"),
    "blend": lambda: routed("blend"),
    "retrieval": lambda: routed("retrieval"),
    "dense": lambda: gated(mixed_pool(), PrefixGate.of([0.25] * 4)),
    "top 1": lambda: gated(mixed_pool(), FixedShareGate.of([0.25] * 4, 0.2), top_m=1, refresh_every=5),
    "top 2": lambda: gated(mixed_pool(), FixedShareGate.of([0.25] * 4, 0.2), top_m=2, refresh_every=None),
}


def check(opened: OpenModel, config: EngineConfig, *, count: int) -> None:
    """Compare answers, log-probabilities and all, of requests asked one by one and asked together."""
    asked = requests(count, seed=count, vocab=tiny.VOCAB, longest=36, most=14)
    rng = random.Random(count)
    engine = Engine(opened, config)
    try:
        alone = [ask(engine, prompt, sampling) for prompt, sampling in asked]
        tickets = {}
        for place in rng.sample(range(count), count):
            tickets[place] = engine.submit(*asked[place])
            if rng.random() < 0.3:  # the next one joins a turn or more later
                with held(engine):
                    pass
        assert {place: collect(ticket) for place, ticket in tickets.items()} == dict(enumerate(alone))
        assert [answer.end.reason for answer in alone] == ["length"] * count
    finally:
        engine.close()


@pytest.mark.parametrize("name", MODELS)
def test_together_as_alone(name: str, caplog: pytest.LogCaptureFixture) -> None:
    check(MODELS[name](), EngineConfig(slots=5, prompt_piece_tokens=7), count=12)
    assert "in turn" not in caplog.text


@pytest.mark.parametrize("name", ["llama", "phatgoose", "dense"])
def test_one_request_per_pass(name: str) -> None:
    check(MODELS[name](), EngineConfig(slots=5, batching=False, prompt_piece_tokens=7), count=5)


def test_places_that_become_free_leave_nothing_behind() -> None:
    """Requests given up at any moment change nothing for those that stay, nor for those that take their places."""
    engine = Engine(routed("blend"), EngineConfig(slots=3))
    asked = requests(6, seed=1, vocab=tiny.VOCAB, longest=20)
    alone = [ask(engine, *each) for each in asked]
    found: list[Answer] = []
    for prompt, sampling in asked:
        others = [engine.submit([place, 9, 2], asked[place][1]) for place in (3, 4)]
        ticket = engine.submit(prompt, sampling)
        first = ticket.next(PATIENCE_S)
        for other in others:
            other.cancel()
        rest = collect(ticket)
        assert isinstance(first, Token)
        found.append(Answer((first, *rest.tokens), rest.end))
    engine.close()
    assert found == alone

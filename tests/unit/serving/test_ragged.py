"""Requests share passes only where that changes no bit of what each gets alone, and the model stays as it was."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from support import experts as tiny
from support.asking import Ticket, ask, collect, held, requests
from support.gated import mixed_pool, whole_pool
from support.in_memory import eager, gated, long_rope, mixture_of_experts, plain, routed, sliding, without_keys
from torch import Tensor

from weftlm.gating.bayes import FixedShareGate
from weftlm.gating.prefix_gate import PrefixGate
from weftlm.models.open import stepping_of
from weftlm.pipeline.any_model import OpenModel
from weftlm.routing import kernels
from weftlm.serving import engine as engine_module
from weftlm.serving.engine import Engine
from weftlm.serving.ragged import ATTENTION
from weftlm.serving.request import Sampling
from weftlm.serving.stepping import ModelState, OneByOne, Ragged, stepper_for, trial

TOGETHER: dict[str, Callable[[], OpenModel]] = {
    "llama": lambda: plain(tiny.llama()),
    "gpt2": lambda: plain(tiny.gpt2()),
    "sliding windows": lambda: plain(sliding()),
    "bfloat16": lambda: plain(tiny.llama().bfloat16()),
    "phatgoose": lambda: routed("phatgoose"),
    "blend": lambda: routed("blend"),
    "retrieval": lambda: routed("retrieval"),
    "arrow": lambda: routed("arrow"),
    "prefix": lambda: routed("prefix"),
    "merged": lambda: routed("merged"),
    "gated": lambda: gated(mixed_pool(), PrefixGate.of([0.25] * 4)),
    "sparse": lambda: gated(mixed_pool(), FixedShareGate.of([0.25] * 4, 0.2), top_m=2, refresh_every=5),
}


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 7)


@pytest.mark.parametrize("name", TOGETHER)
def test_together_as_alone(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Answers, log-probabilities and all, of requests asked one by one and together; others join and give up.

    That they are the model's own within rounding is tried when the engine is made, and said in the log where not.
    """
    asked = requests(7, seed=12, vocab=tiny.VOCAB, longest=36, most=14)
    rng = random.Random(12)
    engine = Engine(TOGETHER[name](), slots=5)
    try:
        alone = [ask(engine, prompt, sampling) for prompt, sampling in asked]
        tickets = {}
        for place in rng.sample(range(7), 7):
            other = Ticket(engine, [place, 9, 2], asked[place][1])
            tickets[place] = Ticket(engine, *asked[place])
            if rng.random() < 0.3:  # the next one joins a turn or more later, in a place that becomes free
                with held(engine):
                    other.cancel()
        assert {place: collect(ticket) for place, ticket in tickets.items()} == dict(enumerate(alone))
        assert [answer.end.reason for answer in alone] == ["length"] * 7
    finally:
        engine.close()
    assert ("in turn" in caplog.text) == (name == "sparse")


def test_the_model_is_left_as_it_was_and_attention_that_is_bypassed_is_an_error() -> None:
    """While an engine has it, its own passes give the same bits; closed, its settings are what they were."""
    model, ids_BT = tiny.llama(), tiny.prompts(3, 9)
    with torch.no_grad():
        before = model(input_ids=ids_BT).logits
    engine = Engine(plain(model))
    assert model.config._attn_implementation == ATTENTION
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids_BT).logits, before)
    sampling = Sampling(max_tokens=30, temperature=0.0, ignore_eos=True)
    expected = ask(engine, [3, 4], sampling)
    with held(engine):
        ticket = Ticket(engine, [3, 4], sampling)
        model.config._attn_implementation = "sdpa"
    end = collect(ticket).end
    assert end.reason == "error"
    assert "bypasses `ragged_attention`" in end.message
    model.config._attn_implementation = ATTENTION
    assert ask(engine, [3, 4], sampling) == expected
    engine.close()
    assert model.config._attn_implementation == "sdpa"


# -- the choice --------------------------------------------------------------------------------------------------------

UNSHARED: dict[str, tuple[Callable[[], OpenModel], str]] = {
    "experts": (lambda: plain(mixture_of_experts()), "sorts the tokens of a pass by expert"),
    "eager": (lambda: plain(eager()), r"attention \(eager\) cannot be exchanged"),
    "rotary": (lambda: plain(long_rope()), r"positions \(dynamic\) depend on the longest text"),
    "state": (lambda: plain(without_keys()), "keeps no cache of keys and values"),
}


@pytest.mark.parametrize("name", UNSHARED)
def test_models_that_cannot_share_passes_are_served_in_turn(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, reason = UNSHARED[name]
    opened, prompt = make(), [5, 9, 33, 2]
    engine = Engine(opened)
    answer = ask(engine, prompt, Sampling(max_tokens=6, temperature=0.0, ignore_eos=True))
    engine.close()
    assert re.search(f"passes of its own, in turn: .*{reason}", caplog.text)
    ids_1T = torch.tensor([prompt])
    found = opened.model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), do_sample=False, max_new_tokens=6)
    assert answer.ids == found[0, 4:].tolist()


def test_shared_passes_take_no_product_that_is_sorted_by_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere such a product may be taken, and is where it costs least."""
    monkeypatch.setattr(kernels, "COPY_SECONDS_PER_BYTE", 1.0)
    monkeypatch.setattr(kernels, "LARGE_PRODUCT", 1e15)
    opened, taken = routed("phatgoose"), list[int]()
    own = kernels.grouped_delta

    def grouped(*args: Tensor) -> Tensor:
        taken.append(len(args[0]))
        return own(*args)

    monkeypatch.setattr(kernels, "grouped_delta", grouped)
    with torch.no_grad():
        opened.model(input_ids=torch.ones((16, 1), dtype=torch.int64))
    assert 16 in taken
    taken.clear()
    stepper = stepper_for(opened, 16)
    assert isinstance(stepper, Ragged)
    assert 16 not in taken
    stepper.close()


class Faulty(Ragged):
    """Shared passes with a fault."""

    fault: Callable[[list[Tensor]], None]

    def step(self, states: Sequence[ModelState], tokens: Sequence[int]) -> list[Tensor]:
        logits = [row.clone() for row in super().step(states, tokens)]
        type(self).fault(logits)
        return logits


def by_place(logits: list[Tensor]) -> None:
    if len(logits) > 4:
        logits[4][7] = logits[4][7].nextafter(torch.tensor(9.0))


def by_neighbours(logits: list[Tensor]) -> None:
    for row in logits[1:]:
        row[3] += 1e-6 * logits[0][3]


def by_a_lot(logits: list[Tensor]) -> None:
    for row in logits:
        row.neg_()


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda logits: None, ""),
        (by_place, "depend on its place in a pass or on the requests beside it"),
        (by_neighbours, "depend on its place in a pass or on the requests beside it"),
        (by_a_lot, "do not give what the model gives"),
    ],
)
def test_faults_are_found(fault: Callable[[list[Tensor]], None], found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Faulty, "fault", fault, raising=False)
    opened = plain(tiny.llama())
    faulty = Faulty(opened, 8)
    result = trial(faulty, OneByOne(opened), 5, tiny.VOCAB, 64)
    faulty.close()
    assert found in result
    assert bool(result) == bool(found)


def test_odd_widths_get_the_rows_they_need() -> None:
    """With a width of 37, elementwise functions leave some numbers over at 8 rows on most CPUs, and none at 64."""
    opened = plain(sliding(intermediate_size=37))
    stepper = stepper_for(opened, 8)
    assert isinstance(stepper, Ragged)
    assert trial(stepper, OneByOne(opened), 8, tiny.VOCAB, 64) == ""
    stepper.close()


def test_prompts_are_read_in_pieces_where_that_changes_nothing() -> None:
    whole = [routed("retrieval"), plain(without_keys())]
    pieces = [routed("blend"), routed("merged"), plain(tiny.gpt2())]
    pieces.append(gated(whole_pool(2), FixedShareGate.of([0.5, 0.5], 0.1)))
    assert [stepping_of(opened.model).in_pieces for opened in whole + pieces] == [False] * 2 + [True] * 4

"""Passes are shared only where that was found to change nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import experts as tiny
from support.asking import ask
from support.gated import whole_pool
from support.in_memory import eager, gated, long_rope, mixture_of_experts, plain, routed, sliding, without_keys
from torch import Tensor

from weftlm.gating.bayes import FixedShareGate
from weftlm.gating.experts import ExpertPool
from weftlm.models.stepping import stepping_of
from weftlm.pipeline.any_model import OpenModel
from weftlm.routing.kernels import packed_delta
from weftlm.serving import ragged
from weftlm.serving.engine import Engine
from weftlm.serving.ragged import Ragged
from weftlm.serving.request import Sampling
from weftlm.serving.stepping import OneByOne
from weftlm.serving.trial import stepper_for, trial

UNSHARED: dict[str, tuple[Callable[[], OpenModel], str]] = {
    "experts": (lambda: plain(mixture_of_experts()), "sorts the tokens of a pass by expert"),
    "eager": (lambda: plain(eager()), r"attention \(eager\) cannot be exchanged"),
    "rotary": (lambda: plain(long_rope()), r"positions \(dynamic\) depend on the longest text"),
    "state": (lambda: plain(without_keys()), "does not take past_key_values and position_ids"),
    "gated": (
        lambda: gated(ExpertPool.of({"a": eager(), "b": eager()}), FixedShareGate.of([0.5, 0.5], 0.1)),
        "cannot be exchanged",
    ),
}


@pytest.mark.parametrize("name", UNSHARED)
def test_models_that_cannot_share_passes_are_served_in_turn(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, reason = UNSHARED[name]
    opened = make()
    engine = Engine(opened)
    prompt = [5, 9, 33, 2]
    answer = ask(engine, prompt, Sampling(max_tokens=6, temperature=0.0, ignore_eos=True))
    engine.close()
    assert isinstance(engine._stepper, OneByOne)
    assert re.search(f"passes of its own, in turn: .*{reason}", caplog.text)
    ids_1T = torch.tensor([prompt])
    found = opened.model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), do_sample=False, max_new_tokens=6)
    assert answer.ids == found[0, 4:].tolist()


def test_products_sorted_by_expert_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = routed("phatgoose")
    stepper = stepper_for(opened, 8)
    assert isinstance(stepper, Ragged)
    stepper.close()
    monkeypatch.setattr(ragged, "cheapest", lambda *_: packed_delta)
    assert isinstance(stepper_for(opened, 8), OneByOne)
    assert isinstance(stepper_for(opened, 1), OneByOne)


class Bent(Ragged):
    """Shared passes with a fault."""

    def __init__(self, opened: OpenModel, bend: Callable[[list[Tensor]], None]) -> None:
        super().__init__(opened, 8)
        self.bend = bend

    def step(self, states: Sequence[Any], tokens: Sequence[int]) -> list[Tensor]:
        logits = [row.clone() for row in super().step(states, tokens)]
        self.bend(logits)
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
    ("bend", "found"),
    [
        (lambda logits: None, ""),
        (by_place, "depend on its place in a pass or on the requests beside it"),
        (by_neighbours, "depend on its place in a pass or on the requests beside it"),
        (by_a_lot, "do not give what the model gives"),
    ],
)
def test_faults_are_found(bend: Callable[[list[Tensor]], None], found: str) -> None:
    opened = plain(tiny.llama())
    bent = Bent(opened, bend)
    with torch.inference_mode():
        result = trial(bent, OneByOne(opened), 5, tiny.VOCAB, 64)
    bent.close()
    assert found in result
    assert bool(result) == bool(found)


def test_odd_widths_get_the_rows_they_need() -> None:
    """With a width of 37, elementwise functions leave some numbers over at 8 rows on most CPUs, and none at 64."""
    opened = plain(sliding(intermediate_size=37))
    stepper = stepper_for(opened, 8)
    assert isinstance(stepper, Ragged)
    with torch.inference_mode():
        assert trial(stepper, OneByOne(opened), 8, tiny.VOCAB, 64) == ""
    stepper.close()


def test_prompts_are_read_in_pieces_where_that_changes_nothing() -> None:
    whole = [routed("retrieval"), plain(without_keys())]
    pieces = [routed("blend"), routed("merged"), routed("uniform"), plain(tiny.gpt2())]
    pieces.append(gated(whole_pool(2), FixedShareGate.of([0.5, 0.5], 0.1)))
    assert [stepping_of(opened.model).in_pieces for opened in whole + pieces] == [False] * 2 + [True] * 5

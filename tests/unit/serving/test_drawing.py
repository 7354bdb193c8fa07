"""Tokens are drawn by the settings of their request alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weftlm.errors import NumericsError
from weftlm.serving.drawing import Draw, most_likely
from weftlm.serving.request import Sampling

LOGITS = torch.tensor([0.0, 2.0, 1.0, 2.0, -1.0])


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    draw = Draw(Sampling(temperature=0))
    assert draw(LOGITS).id == 1
    assert draw(torch.zeros(5000)).id == 0
    tied = torch.zeros(5000)
    tied[[4321, 77, 1234]] = 3.0
    assert draw(tied).id == 77
    assert Draw(Sampling(temperature=0, logprobs=2))(tied).top[0][0] == 77


def test_log_probabilities_are_of_the_models_own_distribution() -> None:
    logp = torch.log_softmax(LOGITS, 0)
    for sampling in (Sampling(temperature=0, logprobs=3), Sampling(temperature=9.0, top_p=0.3, seed=1, logprobs=3)):
        drawn = Draw(sampling)(LOGITS)
        assert drawn.logprob == float(logp[drawn.id])
        assert drawn.top == tuple((place, float(logp[place])) for place in (1, 3, 2))
    assert Draw(Sampling(logprobs=0, seed=0))(LOGITS).top == ()
    assert Draw(Sampling(seed=0))(LOGITS).logprob is None


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.6), (0.7, 0.9)])
def test_frequencies_are_the_probabilities(temperature: float, top_p: float) -> None:
    draw = Draw(Sampling(temperature=temperature, top_p=top_p, seed=3))
    count = 4000
    found = torch.bincount(torch.tensor([draw(LOGITS).id for _ in range(count)]), minlength=5) / count
    p, ids = torch.softmax(LOGITS.double() / temperature, 0).sort(descending=True, stable=True)
    kept = next(size for size in range(1, 6) if size == 5 or float(p[:size].sum()) >= top_p)
    expected = torch.zeros(5, dtype=torch.float64)
    expected[ids[:kept]] = p[:kept] / p[:kept].sum()
    assert bool(((found > 0) <= (expected > 0)).all())
    assert float((found - expected).abs().max()) < 5 * math.sqrt(0.25 / count)


def test_the_same_seed_draws_the_same_whatever_was_drawn_before() -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    first, second, third = Draw(Sampling(seed=5)), Draw(Sampling(seed=5)), Draw(Sampling(seed=5))
    expected = [first(row).id for row in logits]
    assert [second(row).id for row in logits] == expected
    for _ in range(10):
        third(torch.zeros(7))
    assert [third(row).id for row in logits[10:]] == expected[10:], "a draw takes one number"
    unseeded = [tuple(draw(row).id for row in logits) for draw in (Draw(Sampling()), Draw(Sampling()))]
    assert unseeded[0] != unseeded[1]


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([0.0, 1.0, -3.0, -math.inf, 50.0]), min_size=1, max_size=9).filter(
        lambda row: max(row) > -math.inf
    ),
    st.sampled_from([1e-12, 0.1, 1.0, 1e12]),
    st.sampled_from([1e-9, 0.5, 1.0]),
)
def test_extreme_settings_draw_something_possible(row: list[float], temperature: float, top_p: float) -> None:
    drawn = Draw(Sampling(temperature=temperature, top_p=top_p, seed=0, logprobs=20))(torch.tensor(row))
    assert row[drawn.id] > -math.inf
    if temperature < 1e-6 or top_p < 1e-6:
        assert row[drawn.id] == max(row)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers(bad: float) -> None:
    with pytest.raises(NumericsError, match="cannot be drawn"):
        Draw(Sampling(temperature=0))(torch.tensor([0.0, bad]))


@given(st.lists(st.sampled_from([0.0, -1.0, -2.0]), min_size=1, max_size=12), st.integers(0, 14))
def test_most_likely_are_in_order(row: list[float], count: int) -> None:
    expected = sorted(enumerate(row), key=lambda pair: (-pair[1], pair[0]))[:count]
    assert most_likely(torch.tensor(row), count) == tuple(expected)

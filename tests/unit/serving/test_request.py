"""Settings are checked, and tokens are drawn by the settings of their request alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weftlm.errors import NumericsError
from weftlm.serving.request import Draw, Sampling

LOGITS = torch.tensor([0.0, 2.0, 1.0, 2.0, -1.0])


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    tied = torch.zeros(5000)
    tied[[4321, 77, 1234]] = 3.0
    draw = Draw(Sampling(temperature=0))
    assert [draw(logits_V).id for logits_V in (LOGITS, torch.zeros(5000), tied)] == [1, 0, 77]


def test_log_probabilities_are_of_the_models_own_distribution() -> None:
    logp = torch.log_softmax(LOGITS, 0)
    for sampling in (Sampling(temperature=0, logprobs=3), Sampling(temperature=9.0, top_p=0.3, seed=1, logprobs=3)):
        drawn = Draw(sampling)(LOGITS)
        assert drawn.logprob == float(logp[drawn.id])
        assert {token for token, _ in drawn.top} == {1, 2, 3}
        assert [nats for _, nats in drawn.top] == logp[[1, 3, 2]].tolist()
    assert Draw(Sampling(logprobs=0, seed=0))(LOGITS).top == ()
    assert Draw(Sampling(seed=0))(LOGITS).logprob is None


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (0.7, 0.9)])
def test_frequencies_are_the_probabilities(temperature: float, top_p: float) -> None:
    draw, count = Draw(Sampling(temperature=temperature, top_p=top_p, seed=3)), 4000
    found = torch.bincount(torch.tensor([draw(LOGITS).id for _ in range(count)]), minlength=5) / count
    p, ids = torch.softmax(LOGITS.double() / temperature, 0).sort(descending=True, stable=True)
    kept = next(size for size in range(1, 6) if size == 5 or float(p[:size].sum()) >= top_p)
    expected = torch.zeros(5, dtype=torch.float64)
    expected[ids[:kept]] = p[:kept] / p[:kept].sum()
    assert bool(((found > 0) <= (expected > 0)).all())
    assert float((found - expected).abs().max()) < 5 * math.sqrt(0.25 / count)


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


@pytest.mark.parametrize("bad", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
def test_logits_that_are_no_numbers(bad: list[float]) -> None:
    with pytest.raises(NumericsError, match="cannot be drawn"):
        Draw(Sampling(temperature=0))(torch.tensor(bad))


@pytest.mark.parametrize(
    "changed",
    [
        {"max_tokens": 0}, {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 0.0},
        {"top_p": 1.01}, {"seed": 1 << 64}, {"seed": 0.5}, {"stop": ("a", "")}, {"stop": "END"}, {"logprobs": 21},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changed))):
        Sampling(**changed)

"""Prompts and targets as models read them: nothing but the target is predicted, and padding is nobody's business."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.experts import llama, t5

from weftlm.corpora.examples import ExampleSource
from weftlm.models.prompted import Prompted, PromptedExamples, fitted, is_encoder_decoder, target_nats

CPU = torch.device("cpu")
EOS = 63


def ids(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


ROWS = [
    Prompted(ids(5, 6, 7), ids(8, 9, EOS)),
    Prompted(ids(10), ids(11, EOS)),
    Prompted(ids(12, 13, 14, 15, 16), ids(EOS)),
]


def causal_by_hand(model: Any, row: Prompted) -> float:
    """One row alone, no mask, the sum written out."""
    whole = [*row.prompt_P.tolist(), *row.target_C.tolist()]
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([whole])).logits[0]
    total = 0.0
    for place in range(len(row.prompt_P), len(whole)):
        scores_V = logits_TV[place - 1]
        total += float(torch.logsumexp(scores_V, 0) - scores_V[whole[place]])
    return total


def t5_by_hand(model: Any, row: Prompted) -> float:
    decoder = [model.config.decoder_start_token_id, *row.target_C[:-1].tolist()]
    with torch.no_grad():
        found = model(input_ids=torch.tensor([row.prompt_P.tolist()]), decoder_input_ids=torch.tensor([decoder]))
    return sum(
        float(torch.logsumexp(found.logits[0, j], 0) - found.logits[0, j, token])
        for j, token in enumerate(row.target_C.tolist())
    )


@pytest.mark.parametrize(("make", "by_hand"), [(llama, causal_by_hand), (t5, t5_by_hand)])
def test_the_loss_is_that_of_each_target_alone(make: Any, by_hand: Any) -> None:
    model = make().double()
    encoder = is_encoder_decoder(model)
    expected = [by_hand(model, row) for row in ROWS]
    with torch.no_grad():
        together_B = target_nats(model, ROWS, CPU, encoder=encoder)
        alone = [float(target_nats(model, [row], CPU, encoder=encoder)) for row in ROWS]
        backwards_B = target_nats(model, ROWS[::-1], CPU, encoder=encoder)
    assert together_B.dtype == torch.float64
    assert together_B.tolist() == pytest.approx(expected, rel=1e-12)
    assert alone == pytest.approx(expected, rel=1e-12)
    assert backwards_B.tolist()[::-1] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("encoder", "prompt", "target", "length", "expected"),
    [
        (False, (1, 2), (3,), 8, ([1, 2], [3, EOS])),
        (False, (1, 2, 3, 4, 5), (6,), 6, ([2, 3, 4, 5], [6, EOS])),  # the prompt loses its beginning
        (False, (1,), (2, 3, 4, 5), 4, ([1], [2, 3, 4])),  # the target its end
        (False, (1, 2, 3, 4), (5, 6, 7, 8), 5, ([3, 4], [5, 6, 7])),  # neither more than half
        (False, (1, 2, 3, 4), (5, 6, 7, 8), 2, ([4], [5])),
        (False, (), (5,), 4, ([EOS], [5, EOS])),
        (True, (1, 2), (3,), 3, ([1, 2, EOS], [3, EOS])),
        (True, (1, 2, 3, 4), (5, 6, 7, 8), 3, ([3, 4, EOS], [5, 6, 7])),
        (True, (), (5,), 2, ([EOS], [5, EOS])),
    ],
)
def test_what_a_model_reads_of_a_long_example(
    encoder: bool, prompt: tuple[int, ...], target: tuple[int, ...], length: int, expected: tuple[list[int], list[int]]
) -> None:
    found = fitted(ids(*prompt), ids(*target), eos_id=EOS, length=length, encoder=encoder)
    assert (found.prompt_P.tolist(), found.target_C.tolist()) == expected


@pytest.mark.parametrize("encoder", [False, True])
def test_lengths_are_known_without_reading(encoder: bool) -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(1, 60, rng.integers(0, 12)), rng.integers(1, 60, rng.integers(1, 12))) for _ in range(80)]
    source = ExampleSource(pairs, eos_id=EOS, target_bytes=[3 * (len(target) + 1) for _, target in pairs])
    for length in (2, 3, 7, 8, 30):
        prompted = PromptedExamples(source.examples, length, encoder)
        rows = prompted.rows(np.arange(80))
        assert prompted.prompts_N.tolist() == [len(row.prompt_P) for row in rows]
        assert prompted.targets_N.tolist() == [len(row.target_C) for row in rows]
        assert prompted.bytes_N.tolist() == pytest.approx([3 * len(row.target_C) for row in rows])
        assert all(len(row.prompt_P) >= 1 and len(row.target_C) >= 1 for row in rows)

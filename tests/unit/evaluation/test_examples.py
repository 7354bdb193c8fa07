"""Held-out examples are scored on their targets, one by one or together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.experts import llama, make_pool, t5

from weftlm.corpora.examples import Examples, ExampleSource
from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.evaluation.config import EvaluationConfig
from weftlm.evaluation.perplexity import evaluate_examples
from weftlm.evaluation.suite import evaluate_suite
from weftlm.models.prompted import PromptedExamples, is_encoder_decoder, target_nats
from weftlm.routing.routed_model import RoutedModel

CPU, EOS, LENGTH = torch.device("cpu"), 63, 9


def task(count: int = 30) -> ExampleSource:
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(1, 60, rng.integers(1, 9)), rng.integers(1, 60, rng.integers(1, 6))) for _ in range(count)]
    return ExampleSource(pairs, EOS, target_bytes=[4 * len(target) for _, target in pairs])


@pytest.mark.parametrize("make", [llama, t5])
def test_a_set_is_the_sum_of_its_targets(make: Any) -> None:
    model, source = make().train(), task()
    encoder = is_encoder_decoder(model)
    prompted = PromptedExamples(source.examples, LENGTH, encoder)
    found = evaluate_examples(model, source.examples, sequence_length=LENGTH, batch_size=7)
    assert model.training
    model.eval()
    with torch.no_grad():
        nats = [float(target_nats(model, [row], CPU, encoder=encoder)) for row in prompted.rows(range(30))]
    assert found.windows.nats_N.tolist() == pytest.approx(nats, rel=1e-4)
    assert found.tokens == prompted.targets_N.sum()
    assert found.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / prompted.bytes_N.sum(), rel=1e-5)
    assert 0 < evaluate_examples(model, source.examples, sequence_length=9, batch_size=4, max_tokens=20).tokens <= 30
    config = EvaluationConfig(batch_size=7)
    assert evaluate_suite(model, {"task": source}, sequence_length=LENGTH, config=config).sets["task"] == found


@pytest.mark.parametrize("make", [llama, t5])
@pytest.mark.parametrize("router", ["merged", "phatgoose", "retrieval"])
def test_neither_padding_nor_neighbours_matter_to_a_routed_model(make: Any, router: str) -> None:
    model = make()
    routed = RoutedModel(model, make_pool(model, 3), router)
    together, alone = (
        evaluate_examples(routed, task(12).examples, batch_size=size, sequence_length=LENGTH).windows.nats_N
        for size in (12, 1)
    )
    assert together.tolist() == pytest.approx(alone.tolist(), rel=1e-4)


def test_what_cannot_be_scored_is_said() -> None:
    model, source = llama(), task()
    with pytest.raises(ConfigError, match="sequence_length is 1; it must be at least 2"):
        evaluate_examples(model, source.examples, sequence_length=1, batch_size=2)
    none = Examples(source, np.zeros((0, 2), np.int64), [], [], EOS)
    with pytest.raises(DataError, match="holds no example"):
        evaluate_examples(model, none, sequence_length=8, batch_size=2)
    unknown = evaluate_examples(model, ExampleSource([([1], [2])], EOS).examples, sequence_length=8, batch_size=2)
    assert unknown.to_json()["bits_per_byte"] is None
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(NumericsError, match=r"'task'.*not a number on 30 of 30 held-out examples"):
        evaluate_suite(model, {"task": source}, sequence_length=LENGTH)

"""Several sets at once: names, means, differences, configuration."""

import json
from typing import Any

import numpy as np
import pytest

from weftlm.config import validate
from weftlm.errors import ConfigError, DataError
from weftlm.evaluation.config import EvaluationConfig
from weftlm.evaluation.perplexity import evaluate_source
from weftlm.evaluation.suite import evaluate_suite, suite_difference


@pytest.fixture
def domains(array_source: Any) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    return {name: array_source(rng.integers(0, 11, size), size * 3, name) for name, size in (("a", 129), ("b", 333))}


def test_a_suite_is_its_sets_beside_their_mean(bigram: Any, source: Any, domains: dict[str, Any]) -> None:
    suite = evaluate_suite(bigram, domains, source, sequence_length=16, config=EvaluationConfig(batch_size=4))
    assert list(suite.sets) == ["target", "a", "b"]
    assert suite.sets["a"] == evaluate_source(bigram, domains["a"], sequence_length=16, batch_size=4)
    assert suite.generic is not None
    assert suite.generic.bits_per_byte == pytest.approx(
        (suite.sets["a"].bits_per_byte + suite.sets["b"].bits_per_byte) / 2
    )
    value = json.loads(json.dumps(suite.to_json(), allow_nan=False))
    assert value["sets"]["target"] == suite.sets["target"].to_json()
    assert value["generic"]["nats_per_token"] == suite.generic.nats_per_token


def test_a_suite_of_the_target_alone_has_no_generic_mean(bigram: Any, source: Any) -> None:
    suite = evaluate_suite(bigram, {}, source, sequence_length=16)
    assert suite.generic is None
    assert "generic" not in suite.to_json()


def test_the_cap_applies_to_each_set(bigram: Any, source: Any, domains: dict[str, Any]) -> None:
    suite = evaluate_suite(bigram, domains, source, sequence_length=16, config=EvaluationConfig(max_tokens_per_set=64))
    assert {name: result.tokens for name, result in suite.sets.items()} == {"target": 64, "a": 64, "b": 64}


def test_two_suites_compare_set_by_set(
    bigram: Any, table_VV: Any, source: Any, domains: dict[str, Any], nats_by_hand: Any
) -> None:
    flat_VV = 0.5 * table_VV + 0.5 / 11
    flat = type(bigram)(flat_VV)
    better = evaluate_suite(bigram, domains, source, sequence_length=16, per_window=True)
    worse = evaluate_suite(flat, domains, source, sequence_length=16, per_window=True)
    difference = suite_difference(better, worse)
    for name, one in {"target": source, **domains}.items():
        by_hand = nats_by_hand(table_VV, one.tokens_N).mean() - nats_by_hand(flat_VV, one.tokens_N).mean()
        assert difference.sets[name].nats_per_token == pytest.approx(by_hand, abs=1e-6)
    assert difference.generic is not None
    assert difference.generic.nats_per_token == pytest.approx(
        (difference.sets["a"].nats_per_token + difference.sets["b"].nats_per_token) / 2
    )
    assert suite_difference(better, better).sets["target"].nats_per_token == 0.0


def test_suites_of_different_sets_are_not_compared(bigram: Any, source: Any, domains: dict[str, Any]) -> None:
    first = evaluate_suite(bigram, domains, source, sequence_length=16, per_window=True)
    second = evaluate_suite(bigram, {"a": domains["a"]}, source, sequence_length=16, per_window=True)
    with pytest.raises(DataError, match="b in only one of them"):
        suite_difference(first, second)


def test_errors_name_the_set(bigram: Any, source: Any, array_source: Any) -> None:
    with pytest.raises(DataError, match="evaluating 'tiny': a held-out set of 1 tokens"):
        evaluate_suite(bigram, {"tiny": array_source(np.array([1]), 1)}, source, sequence_length=16)
    with pytest.raises(ConfigError, match="rename the domain"):
        evaluate_suite(bigram, {"target": source}, source, sequence_length=16)
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate_suite(bigram, {}, sequence_length=16)


def test_the_configuration_refuses_what_makes_no_sense() -> None:
    assert EvaluationConfig().every_steps is None
    with pytest.raises(ConfigError, match="did you mean 'every_steps'"):
        validate(EvaluationConfig, {"every_step": 3}, "evaluation")
    with pytest.raises(ConfigError, match=r"evaluation\.batch_size: must be at least 1"):
        validate(EvaluationConfig, {"batch_size": 0}, "evaluation")

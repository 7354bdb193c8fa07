"""Several sets at once: names, means, differences, tasks, configuration."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.served import llama, tokenizer

from weftlm.corpora.source import ArraySource
from weftlm.errors import ConfigError, DataError
from weftlm.evaluation.choices import mean_accuracy, read_tasks, score_choices, score_tasks
from weftlm.evaluation.config import ChoiceTask, EvaluationConfig
from weftlm.evaluation.perplexity import evaluate_source
from weftlm.evaluation.suite import SuiteResult, evaluate_suite, suite_difference


@pytest.fixture
def domains() -> dict[str, Any]:
    rng = np.random.default_rng(2)
    sizes = {"a": 129, "b": 333}
    return {name: ArraySource(rng.integers(0, 11, size), text_bytes=size * 3) for name, size in sizes.items()}


def test_a_suite_is_its_sets_beside_their_mean(bigram: Any, source: Any, domains: dict[str, Any]) -> None:
    suite = evaluate_suite(bigram, domains, source, sequence_length=16, config=EvaluationConfig(batch_size=4))
    assert list(suite.sets) == ["target", "a", "b"]
    assert suite.sets["a"] == evaluate_source(bigram, domains["a"], sequence_length=16, batch_size=4)
    assert suite.generic is not None
    assert suite.generic.bits_per_byte == pytest.approx(np.mean([suite.sets[name].bits_per_byte for name in "ab"]))
    value = json.loads(json.dumps(suite.to_json(), allow_nan=False))
    assert value["sets"]["target"] == suite.sets["target"].to_json()
    assert value["generic"]["nats_per_token"] == suite.generic.nats_per_token
    alone = evaluate_suite(bigram, {}, source, sequence_length=16)
    assert not {"generic", "tasks"} & alone.to_json().keys()
    capped = evaluate_suite(bigram, domains, source, sequence_length=16, config=EvaluationConfig(max_tokens_per_set=64))
    assert {name: result.tokens for name, result in capped.sets.items()} == {"target": 64, "a": 64, "b": 64}


def test_two_suites_compare_set_by_set(bigram: Any, table_VV: Any, source: Any, domains: dict[str, Any]) -> None:
    other = type(bigram)(0.5 * table_VV + 0.5 / 11)
    better, worse = (evaluate_suite(model, domains, source, sequence_length=16) for model in (bigram, other))
    difference = suite_difference(better, worse)
    for name, one in {"target": source, **domains}.items():
        expected = bigram.nats(one).mean() - other.nats(one).mean()
        assert difference[name].nats_per_token == pytest.approx(expected, abs=1e-6)
    generic = np.mean([difference[name].nats_per_token for name in "ab"])
    assert difference["generic"].nats_per_token == pytest.approx(generic)
    with pytest.raises(DataError, match="b in only one of them"):
        suite_difference(better, evaluate_suite(bigram, {"a": domains["a"]}, source, sequence_length=16))


def test_errors_name_the_set(bigram: Any, source: Any) -> None:
    with pytest.raises(DataError, match="evaluating 'tiny': a held-out set of 1 tokens"):
        evaluate_suite(bigram, {"tiny": ArraySource([1])}, source, sequence_length=16)
    with pytest.raises(ConfigError, match="rename the domain"):
        evaluate_suite(bigram, {"target": source}, source, sequence_length=16)
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate_suite(bigram, {}, sequence_length=16)


def write(path: Path, count: int = 2) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    line: dict[str, Any] = {"choices": ["a field", "an ideal", "exact"]}
    lines = [{**line, "prompt": f"the ring {number} is", "answer": number % 3} for number in range(count)]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return str(path)


def test_a_file_is_a_task_and_a_glob_is_one_for_every_file(tmp_path: Path) -> None:
    for name in ("set/b.jsonl", "set/a.jsonl"):
        write(tmp_path / name)
    rte = write(tmp_path / "rte.jsonl", 9)
    found = read_tasks([
        ChoiceTask(path=rte),
        ChoiceTask(path=rte, name="few", max_questions=3),
        ChoiceTask(path=str(tmp_path / "set/*.jsonl"), name="bbh"),
        ChoiceTask(path=str(tmp_path / "**/b.jsonl"), max_questions=90),
    ])  # fmt: skip
    assert list(found) == ["rte", "few", "bbh/a", "bbh/b", "b"]
    assert [question.prompt for question in found["few"][1]] == ["the ring 1 is", "the ring 4 is", "the ring 7 is"]
    assert [len(questions) for _, questions in found.values()] == [9, 3, 2, 2, 2]
    with pytest.raises(ConfigError, match="two tasks would be called 'rte'"):
        read_tasks([ChoiceTask(path=rte), ChoiceTask(path=rte)])
    with pytest.raises(DataError, match=r"evaluation.tasks: path '.*none.*' matches no file"):
        read_tasks([ChoiceTask(path=str(tmp_path / "none*.jsonl"))])


def test_tasks_are_scored_as_choices_are(tmp_path: Path) -> None:
    model, words = llama(), tokenizer()
    sizes = {"a": 7, "b": 4}
    tasks = [ChoiceTask(path=write(tmp_path / f"{name}.jsonl", count), separator=" ") for name, count in sizes.items()]
    questions = read_tasks(tasks)
    found = score_tasks(model, words, questions, batch_size=4, max_length=64)
    for name, (_, asked) in questions.items():
        assert found[name] == score_choices(model, words, asked, batch_size=9, max_length=64, separator=" ")
    mean, error = mean_accuracy(found)
    assert mean == pytest.approx((found["a"].accuracy + found["b"].accuracy) / 2)
    assert error == pytest.approx(math.hypot(found["a"].accuracy_se, found["b"].accuracy_se) / 2)
    assert SuiteResult({}, None, found).to_json()["tasks"]["a"]["accuracy"] == found["a"].accuracy
    with pytest.raises(DataError, match="task 'a': question 0: max_length 2 leaves no room"):
        score_tasks(model, words, questions, batch_size=4, max_length=2)

"""Tasks of a recipe: found by path, named, ranked, averaged."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.served import llama, tokenizer

from weftlm.errors import ConfigError, DataError
from weftlm.evaluation.choices import score_choices
from weftlm.evaluation.config import ChoiceTask, EvaluationConfig
from weftlm.evaluation.suite import SuiteResult
from weftlm.evaluation.tasks import mean_accuracy, read_tasks, score_tasks

LINE = {"prompt": "the ring is", "choices": ["a field", "an ideal", "exact"], "answer": 1}


def write(path: Path, count: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{**LINE, "prompt": f"the ring {number} is", "answer": number % 3} for number in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def task(**options: Any) -> ChoiceTask:
    return ChoiceTask.model_validate(options)


def test_a_file_is_a_task_and_a_glob_is_one_for_every_file(tmp_path: Path) -> None:
    for name in ("set/b.jsonl", "set/a.jsonl", "rte.jsonl"):
        write(tmp_path / name)
    found = read_tasks(
        [
            task(path=str(tmp_path / "rte.jsonl")),
            task(path=str(tmp_path / "rte.jsonl"), name="again"),
            task(path=str(tmp_path / "set/*.jsonl"), name="bbh"),
            task(path=str(tmp_path / "**/b.jsonl")),
        ]
    )
    assert list(found) == ["rte", "again", "bbh/a", "bbh/b", "b"]
    assert [question.prompt for question in found["rte"][1]] == ["the ring 0 is", "the ring 1 is"]


def test_fewer_questions_are_evenly_spaced(tmp_path: Path) -> None:
    path = str(write(tmp_path / "many.jsonl", 9))
    (found,) = read_tasks([task(path=path, max_questions=3)]).values()
    assert [question.prompt for question in found[1]] == ["the ring 1 is", "the ring 4 is", "the ring 7 is"]
    (whole,) = read_tasks([task(path=path, max_questions=90)]).values()
    assert len(whole[1]) == 9


def test_what_is_wrong_with_a_task_is_said(tmp_path: Path) -> None:
    path = str(write(tmp_path / "one.jsonl"))
    with pytest.raises(ConfigError, match="two tasks would be called 'one'"):
        read_tasks([task(path=path), task(path=path)])
    with pytest.raises(DataError, match=r"evaluation.tasks: path '.*none.*' matches no file"):
        read_tasks([task(path=str(tmp_path / "none*.jsonl"))])
    questions = read_tasks([task(path=path)])
    with pytest.raises(DataError, match="task 'one': question 0: max_length 2 leaves no room"):
        score_tasks(llama(), tokenizer(), questions, batch_size=4, max_length=2)


def test_tasks_are_scored_as_choices_are(tmp_path: Path) -> None:
    model, words = llama(), tokenizer()
    questions = read_tasks(
        [
            task(path=str(write(tmp_path / f"{name}.jsonl", count)), separator=" ")
            for name, count in (("a", 7), ("b", 4))
        ]
    )
    found = score_tasks(model, words, questions, batch_size=4, max_length=64)
    for name, (_, asked) in questions.items():
        alone = score_choices(model, words, asked, batch_size=9, max_length=64, separator=" ")
        # The batches differ, so the last bits of a sum may.
        assert alone.answer_log_prob == pytest.approx(found[name].answer_log_prob, rel=1e-6)
        assert alone.answer_log_prob_se == pytest.approx(found[name].answer_log_prob_se, rel=1e-6)
        exact = {"answer_log_prob": 0.0, "answer_log_prob_se": 0.0}
        assert dataclasses.replace(alone, **exact) == dataclasses.replace(found[name], **exact)
    mean, error = mean_accuracy(found)
    assert mean == pytest.approx((found["a"].accuracy + found["b"].accuracy) / 2)
    assert error == pytest.approx(math.hypot(found["a"].accuracy_se, found["b"].accuracy_se) / 2)
    with pytest.raises(DataError, match="at least one task"):
        mean_accuracy({})
    told = replace(SuiteResult({}, None), tasks=found).to_json()
    assert told["tasks"]["a"]["accuracy"] == found["a"].accuracy
    assert "correct" not in told["tasks"]["a"]
    assert "tasks" not in SuiteResult({}, None).to_json()


def test_a_recipe_has_no_tasks_unless_it_names_some() -> None:
    assert EvaluationConfig().tasks == ()
    assert EvaluationConfig.model_validate({"tasks": [{"path": "x.jsonl"}]}).tasks[0].separator == ""

"""lm-evaluation-harness's own command over weftlm's models, on local tasks: its numbers are weftlm's."""

from __future__ import annotations

import functools
import json
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import numpy as np
import pytest
import yaml
from support import served
from support.tiny_project import WORDS, environment, sentence

from weftlm.corpora.source import ArraySource
from weftlm.evaluation.choices import ChoiceQuestion, score_choices
from weftlm.evaluation.perplexity import evaluate_source
from weftlm.integrations.lm_eval import main
from weftlm.pipeline.any_model import OpenModel, open_model

QUESTIONS, DOCUMENTS = 6, 2
COMMAND = """
import functools
import lm_eval.evaluator
import lm_eval.tasks

lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
lm_eval.evaluator.add_env_info = lambda results: None
from lm_eval.__main__ import cli_evaluate

cli_evaluate()
"""
"""The harness's command without its own task files and its description of the machine: a quarter of a minute."""


def sentences(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [sentence(rng, rng.choice(list(WORDS.values()))) for _ in range(count)]


def write_tasks(folder: Path) -> list[ChoiceQuestion]:
    """Two tasks over JSON Lines files: ranked answers and bits per byte."""
    folder.mkdir()
    prompts, others = sentences(QUESTIONS, 1), np.array(sentences(3 * QUESTIONS, 2)).reshape(QUESTIONS, 3).tolist()
    questions = [
        ChoiceQuestion(prompt, tuple(dict.fromkeys(choices)), number % 2)
        for number, (prompt, choices) in enumerate(zip(prompts, others, strict=True))
    ]
    rows = {
        "ranked": [{"prompt": q.prompt, "choices": list(q.choices), "answer": q.answer} for q in questions],
        "texts": [{"text": text} for text in sentences(DOCUMENTS, 3)],
    }
    parts: dict[str, dict[str, Any]] = {
        "ranked": {
            "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}",
            "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}],
        },
        "texts": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
        },
    }  # fmt: skip
    for name, part in parts.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows[name])
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        task = {
            "task": f"weftlm_{name}", "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}, **part,
        }  # fmt: skip
        # The harness of today reads no entry points: a task file given by its path names the model.
        told = "metadata: {version: 1, model: !function weftlm.integrations.lm_eval.WeftLM}\n"
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task) + told, encoding="utf-8")
    return questions


def results(folder: Path) -> Mapping[str, Any]:
    (found,) = folder.rglob("results_*.json")
    value: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return value


def check(found: Mapping[str, Any], opened: OpenModel, folder: Path, questions: list[ChoiceQuestion]) -> None:
    """The harness's accuracy and bits per byte are those of weftlm.evaluation on the same items."""
    ours = score_choices(opened.model, opened.tokenizer, questions, batch_size=8, max_length=256, separator=" ")
    assert 0 < ours.accuracy_sum < 1
    assert found["results"]["weftlm_ranked"]["acc,none"] == pytest.approx(ours.accuracy_sum, abs=1e-12)
    bits, length = 0.0, 0
    for line in (folder / "texts.jsonl").read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        ids = [opened.tokenizer.eos_id, *opened.tokenizer.encode_batch([text])[0].tolist()]
        source = ArraySource(np.array(ids), text_bytes=len(text.encode()))
        bits += evaluate_source(opened.model, source, sequence_length=256, batch_size=4).bits_per_byte * source.bytes
        length += source.bytes
    assert found["results"]["weftlm_texts"]["bits_per_byte,none"] == pytest.approx(bits / length, rel=1e-6)
    assert found["config"]["weftlm_kind"] == opened.kind


@pytest.mark.slow
def test_the_harness_s_command_measures_a_plain_model(tmp_path: Path) -> None:
    questions = write_tasks(tmp_path / "tasks")
    model = served.write_model(tmp_path, "plain")
    files = ",".join(str(tmp_path / "tasks" / f"{name}.yaml") for name in ("ranked", "texts"))
    finished = subprocess.run(
        [sys.executable, "-c", COMMAND, "--model", "weftlm", "--model_args", f"path={model}", "--tasks", files,
         "--batch_size", "4", "--device", "cpu", "--output_path", tmp_path / "out"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False,
        env={**environment(), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    check(results(tmp_path / "out"), open_model(model), tmp_path / "tasks", questions)


@pytest.mark.parametrize("kind", ["routed", "gated"])
def test_weftlm_s_door_to_the_command_measures_models_of_every_kind(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_tasks(tmp_path / "tasks")
    model = served.write_model(tmp_path, kind)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # Its own task files, thousands of them, and a description of the machine take a quarter of a minute.
    own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    arguments = (
        f"--model weftlm --model_args path={model} --tasks weftlm_ranked,weftlm_texts --batch_size auto --device cpu"
    )
    paths = ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments.split(), *paths])
    main()
    assert "weftlm_ranked" in capsys.readouterr().out
    check(results(tmp_path / "out"), open_model(model), tmp_path / "tasks", questions)

"""A gate over whole models that are there already: no base, no library, one project from text to report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support import served
from support.tiny_project import WORDS, write_corpora

from weftlm.errors import ConfigError, DataError
from weftlm.pipeline.any_model import open_model
from weftlm.pipeline.recipe import make_recipe
from weftlm.pipeline.runner import run_project
from weftlm.pipeline.stages.gate import GatingConfig


@pytest.fixture
def value(tmp_path: Path) -> dict[str, Any]:
    write_corpora(tmp_path / "corpora")
    models = {}
    for seed, name in enumerate(("cooking", "sailing")):
        models[name] = str(served.write_model(tmp_path / name, "plain", seed))
    return {
        "run": str(tmp_path / "run"),
        "data": {
            "corpora": [{"path": str(tmp_path / f"corpora/{name}.jsonl"), "label": name} for name in WORDS],
            "tokenizer": {"pretrained": models["cooking"]},
        },
        "gating": {
            "pool": [{"name": name, "model": model} for name, model in models.items()],
            "offsets": "none",
            "scores": {"length": 8, "sequences": 16, "samples": 16, "batch_size": 16},
            "fit": {"unit": "token", "steps": 40, "report_every_steps": 40, "best_response_steps": 10},
            "held_out_fraction": 0.5,
            "students": {"distil": {"steps": 10, "evaluate_every_steps": 10}, "experts_per_token": []},
        },
    }


def test_a_project_over_given_models_ends_in_a_report(value: dict[str, Any], tmp_path: Path) -> None:
    found = run_project(make_recipe(value), progress=False)
    assert [(status.stage.name, status.state) for status in found] == [
        (name, "done") for name in ("prepare", "score", "gate", "distil", "evaluate", "report")
    ]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert set(summary) == {"sequence_length", "base", "models", "robust", "certificate", "checksum"}
    assert list(summary["models"]) == ["expert: cooking", "expert: sailing", "gate: student"]
    assert "monolith" not in summary["robust"]
    assert open_model(tmp_path / "run/students/student").experts == ("cooking", "sailing")
    page = (tmp_path / "run/report.html").read_text()
    assert ">Every model<" in page
    assert "bits per byte of held-out text, mean over the sets" in page
    assert "Mixture over time" not in page


def test_own_experts_are_told_by_name(value: dict[str, Any]) -> None:
    value["gating"] |= {"offsets": "expert"}
    with pytest.raises(ConfigError, match="algebra has no expert of its own among those scored"):
        run_project(make_recipe(value), progress=False)
    value["gating"] |= {"domains": ["cooking", "sailing"]}
    value["run"] += "-2"
    assert run_project(make_recipe(value), until="gate", progress=False)[2].state == "done"


def test_a_pool_of_another_tokenizer_is_refused(value: dict[str, Any]) -> None:
    value["data"]["tokenizer"] = {"train": {"vocab_size": 300}}
    with pytest.raises(DataError, match="tokenised with another tokenizer than the experts'"):
        run_project(make_recipe(value), progress=False)


def test_a_pool_and_names_of_the_library_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="give one of the two"):
        GatingConfig.model_validate({"pool": [{"name": "a", "model": "x"}], "experts": ["b"]})

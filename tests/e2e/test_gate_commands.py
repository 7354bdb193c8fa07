"""The real command line of scores and gates, called in this process: one tiny project from experts to a certificate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_project import WORDS, recipe_value, write_corpora

from weft.cli.main import main

EXPERTS = {
    "lora": {"rank": 4, "alpha": 8},
    "training": {"sequence_length": 32, "batch_sequences": 8, "steps": 12, "save_every_steps": 12, "device": "cpu"},
    "validate_every_steps": 6,
    "gate": {"steps": 1},
    "statistics_examples": 8,
    "embedder": "tokens-64",
}
GATING = {
    "scores": {"length": 8, "sequences": 40, "samples": 40, "batch_size": 40},
    "fit": {"steps": 60, "report_every_steps": 30, "best_response_steps": 20},
}

Call = Callable[..., Any]


@pytest.fixture
def weft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """`weft("score", ..., code=0)`: what the command prints, JSON where it was asked for; stderr where it fails."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path, code: int = 0) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert (caught.value.code or 0) == code, printed.err
        if code:
            return printed.err
        call.err = printed.err  # type: ignore[attr-defined]
        return json.loads(printed.out) if "--json" in arguments else printed.out

    return call


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Corpora and a recipe with `experts` and `gating` sections."""
    write_corpora(tmp_path / "corpora")
    value = {**recipe_value(), "experts": EXPERTS, "gating": GATING, "mixture": {"policy": "uniform"}}
    value["training"] = {**value["training"], "steps": 30}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def test_from_experts_to_a_certified_gate(project: Path, tmp_path: Path, weft: Call) -> None:
    run = tmp_path / "runs/one"
    weft("train", project, "--json")
    weft("experts", "train", project, "--json")

    # -- scoring
    planned = weft("score", project, "--dry-run", "--json")
    assert planned["plan"]["scores"] == "runs/one/scores"
    assert planned["recipe"]["gating"]["gate"]["gate"] == "linear"
    assert not (run / "scores").exists()
    assert "did you mean 'cooking'" in weft("score", project, "--set", "gating.domains=[coking]", code=2)
    scored = weft("score", project, "--json")
    assert scored["experts"] == sorted(WORDS)
    assert set(scored["domains"]) == set(WORDS)
    for name, facts in scored["domains"].items():
        assert facts["tokens"] == 8 * facts["sequences"]
        assert min(facts["nats_per_token"], key=facts["nats_per_token"].get) == name
    assert scored["samples"] == {name: {"sequences": 40, "tokens": 320} for name in sorted(WORDS)}
    assert weft("score", project, "--json") == scored
    assert "samples of sailing" in weft("score", project)
    assert "stale" in weft("score", project, "--set", "gating.scores.length=4", code=1)

"""Sizes that are not given follow those that are; `--quick` cuts all of them down and leaves the real run alone."""

from __future__ import annotations

from typing import Any

import pytest
from support.tiny_project import recipe_value

from weftlm.cli.project import show_models
from weftlm.experts.config import ExpertTraining
from weftlm.pipeline.demo import LARGEST, demo_recipe, quick
from weftlm.pipeline.recipe import make_recipe


def at(value: Any, key: str) -> Any:
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


@pytest.mark.parametrize("steps", [20, 1000, 5000])
def test_gates_and_statistics_follow_the_experts_steps(steps: int) -> None:
    made = ExpertTraining.model_validate({"training": {"steps": steps, "batch_sequences": 2}})
    assert made.gate.steps == min(100, steps)
    assert made.statistics_examples == min(1000, 2 * steps)
    given = {"training": {"steps": steps}, "gate": {"steps": 300}, "statistics_examples": 7}
    kept = ExpertTraining.model_validate(given)
    assert (kept.gate.steps, kept.statistics_examples) == (300, 7)
    assert ExpertTraining.model_validate({}).gate.steps == 100


def test_a_small_recipe_is_small() -> None:
    sizes = {"evaluation": {"max_tokens_per_set": 8192}, "experts": {"training": {"steps": 20}}}
    value = {**recipe_value(), **sizes, "gating": {}}
    gating = make_recipe(value).gating
    assert gating is not None
    assert (gating.scores.sequences, gating.scores.samples) == (160, 160)
    assert (gating.fit.steps, gating.students.distil.steps) == (2000, 400)
    large = make_recipe({**recipe_value(), "experts": {}, "gating": {}}).gating
    assert large is not None
    assert (large.scores.sequences, large.fit.steps, large.students.distil.steps) == (512, 8000, 1000)
    explicit = make_recipe({**value, "gating": {"fit": {"steps": 9000}, "scores": {"samples": 600}}}).gating
    assert explicit is not None
    assert (explicit.fit.steps, explicit.scores.samples) == (9000, 600)


def test_quick_cuts_every_size_down() -> None:
    project = demo_recipe()
    small = quick(project)
    assert str(small.run) == f"{project.run}-quick"
    found = small.resolved()
    for key, most in LARGEST.items():
        if (value := at(found, key)) is not None:
            assert value <= most, key
    assert small.training.total_steps <= 15
    assert [each.policy for each in small.compare.mixtures] == [each.policy for each in project.compare.mixtures]
    assert quick(small).resolved() == {**found, "run": f"{small.run}-quick"}


def test_a_run_ends_with_the_best_model_and_what_to_do_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(mean: float) -> dict[str, Any]:
        return {
            "path": f"runs/a b/{mean}",
            "sets": {"target": {"bits_per_byte": 3.0}},
            "generic": {"bits_per_byte": mean},
        }

    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(
        "weftlm.pipeline.models_table.read_evaluation",
        lambda project: {"models": {"base": row(2.5), "routed": row(2.0)}},
    )
    show_models(demo_recipe())
    said = capsys.readouterr().out
    assert "best on the domains" in next(line for line in said.splitlines() if line.startswith("│ routed"))
    assert "weftlm serve 'runs/a b/2.0'" in said

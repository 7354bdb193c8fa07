"""Sizes that are not given follow those that are; the demonstration has a quick form."""

from __future__ import annotations

import pytest
from support.tiny_project import recipe_value

from weftlm.experts.config import ExpertTraining
from weftlm.pipeline.quick import LARGEST, demo_recipe, quick
from weftlm.pipeline.recipe import make_recipe


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


def test_the_quick_demonstration_is_small_in_every_stage_and_a_run_of_its_own() -> None:
    project = demo_recipe(["seed=7"])
    small = quick(project)
    assert (str(small.run), small.seed) == (f"{project.run}-quick", 7)
    assert small.training.total_steps <= 15
    assert small.experts.training.total_steps <= 8
    assert small.gating.fit.steps < project.gating.fit.steps
    assert [each.policy for each in small.compare.mixtures] == [each.policy for each in project.compare.mixtures]


def test_a_quick_run_writes_into_no_folder_of_the_real_one() -> None:
    mixture = {"policy": "doremi", "reference": "runs/reference"}
    value = {**recipe_value(), "mixture": mixture, "prepared": "shared/data", "experts": {"library": "shared/experts"}}
    small = quick(make_recipe(value))
    assert [str(each) for each in (small.run, small.prepared, small.library_folder)] == [
        "runs/one-quick", "shared/data-quick", "shared/experts-quick",
    ]  # fmt: skip
    assert small.mixture.reference is None, "which is of other data"


def test_every_key_that_quick_cuts_is_one_of_a_recipe() -> None:
    dense = {"model": recipe_value()["model"], "training": {"steps": 100}}
    value = {**recipe_value(), "experts": {}, "gating": {"students": {"dense": dense}}}
    resolved = make_recipe(value).resolved()
    for key in LARGEST:
        section = resolved
        for part in key.split("."):
            assert part in section, key
            section = section[part]

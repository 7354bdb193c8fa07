"""Sections of a recipe that take settings from one another: one value on one page, unless the recipe says otherwise."""

from __future__ import annotations

import copy

import pytest

from weftlm.errors import ConfigError
from weftlm.pipeline.inherited import INHERITED, names_of
from weftlm.pipeline.recipe import make_recipe
from weftlm.pipeline.stage import stages_of

CORPORA = {"corpora": [{"path": "a.jsonl", "label": "a"}]}
WHOLE = {
    "run": "r",
    "data": CORPORA,
    "model": {"pretrained": "somewhere"},
    "mixture": {"policy": "uniform"},
    "training": {"steps": 3},
    "experts": {},
    "gating": {
        "students": {"dense": {"model": {"architecture": "llama"}, "training": {"steps": 2}}},
    },
}
SMALL = {"run": "r", "data": CORPORA, "experts": {"base": "somewhere"}, "gating": {}}
OTHER = {
    "sequence_length": 48, "batch_sequences": 6, "micro_batch_sequences": 2, "precision": "fp32", "device": "cpu",
    "compile": False, "threads": 1, "dtype": "bfloat16", "rank": 3, "alpha": 5, "dropout": 0.25,
    "target_modules": ["q_proj"], "batch_size": 7, "length": 24,
}  # fmt: skip
"""A value of each inherited key that is no default."""
CASES = [(source, target, *names_of(key)) for source, _, target, keys in INHERITED for key in keys]


def put(recipe, place, value):
    *path, last = place.split(".")
    here = recipe
    for part in path:
        here = here.setdefault(part, {})
    here[last] = value


def at(recipe, place):
    here = recipe
    for part in place.split("."):
        here = here[part]
    return here


@pytest.mark.parametrize(("source", "target", "name", "own"), CASES)
def test_absent_key_follows_the_section_it_is_taken_from_and_a_given_one_stays(source, target, name, own):
    recipe = copy.deepcopy(WHOLE)
    if name == "dtype":
        put(recipe, "model.lora", {})  # weights in half precision are for adapters
    put(recipe, f"{source}.{name}", OTHER[name])
    resolved = make_recipe(recipe).resolved()
    assert at(resolved, f"{target}.{own}") == OTHER[name]
    assert make_recipe(resolved).resolved() == resolved
    default = at(make_recipe(WHOLE).resolved(), f"{target}.{own}")
    if default is not None:
        put(recipe, f"{target}.{own}", default)
        assert at(make_recipe(recipe).resolved(), f"{target}.{own}") == default != OTHER[name]


@pytest.mark.parametrize("recipe", [WHOLE, SMALL], ids=["whole", "experts alone"])
def test_one_window_everywhere_by_default(recipe):
    small = make_recipe(recipe)
    lengths = {small.experts.training.sequence_length, small.gating_settings.scores.length}
    if recipe is WHOLE:
        whole = make_recipe(recipe)
        lengths |= {whole.training.sequence_length, whole.gating.students.dense.training.sequence_length}
    assert len(lengths) == 1


@pytest.mark.parametrize("length", [64, 128])
def test_a_gate_follows_where_the_recipe_has_no_section_for_it_or_no_experts(length):
    small = {**SMALL, "experts": {"base": "somewhere", "training": {"sequence_length": length, "steps": 10}}}
    del small["gating"]
    found = make_recipe(small).gating_settings
    assert (found.scores.length, found.scores.sequences) == (length, 80)
    pool = {key: value for key, value in WHOLE.items() if key != "experts"}
    pool |= {"training": {"steps": 3, "sequence_length": length}, "gating": {"pool": [{"name": "m", "model": "m"}]}}
    made = make_recipe(pool)
    assert made.expert_settings.training.sequence_length == made.gating_settings.scores.length == length


def test_adapters_like_the_models_are_trained_at_its_learning_rate():
    lora = make_recipe({**WHOLE, "model": {"pretrained": "m", "lora": {"alpha": 8}}}).experts
    assert (lora.lora.alpha, lora.training.lr) == (8, 1e-3)
    assert make_recipe(WHOLE).experts.lora.alpha == 1


def test_a_wrong_value_is_reported_where_it_was_written_alone():
    with pytest.raises(ConfigError) as caught:
        make_recipe({**WHOLE, "training": {"steps": 3, "sequence_length": "long"}})
    assert str(caught.value) == "training.sequence_length: must be a whole number (got 'long')"


@pytest.mark.parametrize("stage", ["experts", "score", "evaluate"])
def test_a_finished_stage_is_known_by_the_resolved_value(stage):
    def settings(recipe):
        project = make_recipe(recipe)
        return next(each for each in stages_of(project) if each.name == stage).settings(project)

    followed = {**WHOLE, "training": {"steps": 3, "sequence_length": 64}}
    written = {**followed, "experts": {"training": {"sequence_length": 64}}}
    written["gating"] = {**WHOLE["gating"], "scores": {"length": 64}}
    assert settings(followed) == settings(written) != settings(WHOLE)

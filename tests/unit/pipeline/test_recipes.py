"""Every recipe that ships is valid, and a resolved recipe is the same recipe again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_project import recipe_value

from weftlm.config import validate
from weftlm.errors import ConfigError
from weftlm.gating.mixtures import Box
from weftlm.pipeline.quick import demo_recipe
from weftlm.pipeline.recipe import load_recipe, make_recipe
from weftlm.pipeline.stages.gate import GatingConfig
from weftlm.pipeline.stages.train import training_plan

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    project = load_recipe(path)
    if project.trains:
        assert training_plan(project)["steps"] > 0
    assert make_recipe(yaml.safe_load(project.to_yaml())) == project


def test_plan_counts_parameters_without_building_the_model() -> None:
    described = training_plan(demo_recipe())
    vocabulary, hidden, inner, layers = 1024, 96, 256, 3
    layer = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
    assert described["parameters"] == vocabulary * hidden + layers * layer + hidden
    assert described["tokens"] == described["steps"] * 24 * 128


def test_identity_knows_what_decides_the_weights() -> None:
    recipe = demo_recipe()
    assert make_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    same = demo_recipe(["run=elsewhere", "evaluation.every_steps=7", "training.save_every_steps=3"])
    assert same.deciding() == recipe.deciding()
    assert demo_recipe(["training.parallel=fsdp2"]).deciding() == recipe.deciding()
    assert demo_recipe(["training.lr=0.1"]).deciding() != recipe.deciding()
    assert demo_recipe(["mixture.eta=1"]).deciding() != recipe.deciding()


def test_every_problem_of_a_recipe_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        make_recipe({"run": "x", "model": {"architecture": "llama"}, "mixture": {"policy": "uniform"}, "trainin": {}})
    message = str(caught.value)
    assert "data: missing" in message
    assert "training: missing" in message
    assert "trainin: unknown key; did you mean 'training'?" in message


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"routing": {}}, "routing compares routers over experts, and none are made"),
        ({"gating": {"pool": [{"name": "a", "model": "m"}]}, "routing": {}}, "routing compares routers over experts"),
        ({"gating": {}}, "gating needs experts; .* or name models in gating.pool"),
        ({"compare": {"monolith": True}}, "compare.monolith is the baseline of experts, and none are made"),
        ({"compare": {"mixtures": ["dga"]}}, "compare.mixtures names 'dga', the recipe's own policy"),
        ({"experts": {}, "routing": {"build": ["phatgose"]}}, "routing.build: .*did you mean 'phatgoose'"),
        ({"experts": {}, "routing": {"routers": ["arrow:q=1"]}}, "routing.routers: .*q: unknown key"),
    ],
)
def test_what_nothing_would_come_of_is_refused_before_anything_is_made(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe({**recipe_value(), **sections})


# -- the gating section -----------------------------------------------------------------------------------------------

NAMES = ("algebra", "cooking", "sailing")


def gating(**value: Any) -> GatingConfig:
    return validate(GatingConfig, value, "gating")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"gate": "liner"}, "did you mean 'linear'"),
        ({"gate": {"gate": "linear", "feature": []}}, "gating.gate.feature: unknown key; did you mean 'features'"),
        ({"offsets": "experts"}, "gating.offsets"),
        ({"held_out_fraction": 1.0}, "gating.held_out_fraction"),
        ({"experts": []}, "gating.experts"),
        ({"mixtures": {"upper": {"a": 0.5}, "vertices": [{"a": 1.0}]}}, "not both"),
        ({"scores": {"lenght": 3}}, "gating.scores.lenght: unknown key; did you mean 'length'"),
    ],
)
def test_a_wrong_key_or_value_is_told(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        gating(**value)
    assert message in str(caught.value)


def test_mixtures_are_in_the_order_of_the_domains() -> None:
    assert gating().mixtures.over(NAMES) is None
    box = gating(mixtures={"lower": {"sailing": 0.1}, "upper": {"cooking": 0.4}}).mixtures.over(NAMES)
    assert isinstance(box, Box)
    assert (box.lower_D, box.upper_D) == ([0.0, 0.0, 0.1], [1.0, 0.4, 1.0])
    hull = gating(mixtures={"vertices": [{"sailing": 1.0}, {"cooking": 0.5, "algebra": 0.5}]}).mixtures.over(NAMES)
    assert hull == [[0.0, 0.0, 1.0], [0.5, 0.5, 0.0]]
    with pytest.raises(ConfigError, match=r"gating\.mixtures\.vertices\[0\] names 'salling'.*did you mean 'sailing'"):
        gating(mixtures={"vertices": [{"salling": 1.0}]}).mixtures.over(NAMES)


def test_offsets_are_in_the_order_of_the_domains() -> None:
    assert gating().offsets_over(NAMES) == "expert"
    numbers = {"sailing": 3.0, "algebra": 1.0, "cooking": 2.0}
    assert gating(offsets=numbers).offsets_over(NAMES) == [1.0, 2.0, 3.0]
    with pytest.raises(ConfigError, match="none for sailing"):
        gating(offsets={"algebra": 1.0, "cooking": 2.0}).offsets_over(NAMES)


def test_a_training_run_is_the_same_with_and_without_a_gate() -> None:
    plain = make_recipe(recipe_value())
    gated = make_recipe({**recipe_value(), "experts": {}, "gating": {"gate": {"gate": "fixed_share", "share": 0.25}}})
    assert plain.deciding() == gated.deciding()
    assert make_recipe(gated.resolved()) == gated

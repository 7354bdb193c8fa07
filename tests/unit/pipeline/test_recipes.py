"""Every recipe that ships is valid, and a resolved recipe is the same recipe again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_project import recipe_value

from weftlm.errors import ConfigError
from weftlm.pipeline.demo import demo_recipe
from weftlm.pipeline.recipe import load_recipe, make_recipe
from weftlm.pipeline.recipe_plan import training_plan

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    project = load_recipe(path)
    if project.trains:
        assert training_plan(project)["steps"] > 0
    assert make_recipe(yaml.safe_load(project.to_yaml())) == project


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 3


def test_the_demonstration_is_a_recipe_like_any_other() -> None:
    recipe = demo_recipe(["training.tokens=1000"])
    assert recipe.training.tokens == 1000
    assert make_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_plan_counts_parameters_without_building_the_model() -> None:
    described = training_plan(demo_recipe())
    vocabulary, hidden, inner, layers = 1024, 96, 256, 3
    layer = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
    assert described["parameters"] == vocabulary * hidden + layers * layer + hidden
    assert described["tokens"] == described["steps"] * 24 * 128


def test_identity_knows_what_decides_the_weights() -> None:
    recipe = demo_recipe()
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


def test_routers_need_experts_also_where_no_model_is_trained() -> None:
    given = {key: recipe_value()[key] for key in ("run", "data")}
    pool = {"pool": [{"name": "a", "model": "some/model"}]}
    with pytest.raises(ConfigError, match="routing compares routers over experts"):
        make_recipe({**given, "gating": pool, "routing": {}})
    assert make_recipe({**given, "gating": pool}).has_experts

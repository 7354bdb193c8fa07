"""The `gating` section: strict, by the domains' names, and no part of a training run's identity."""

from __future__ import annotations

from typing import Any

import pytest
from support.tiny_project import recipe_value

from weftlm.config import validate
from weftlm.errors import ConfigError
from weftlm.gating.mixtures import Box
from weftlm.pipeline.gate_recipe import GatingConfig
from weftlm.pipeline.recipe import make_recipe

NAMES = ("algebra", "cooking", "sailing")


def gating(**value: Any) -> GatingConfig:
    return validate(GatingConfig, value, "gating")


def test_the_section_survives_a_round_trip_with_the_gates_own_keys() -> None:
    config = gating(
        gate={"gate": "fixed_share", "share": 0.25}, offsets={"algebra": 1.5}, mixtures={"upper": {"a": 0.5}}
    )
    again = gating(**config.model_dump(mode="json"))
    assert again == config
    assert again.gate.model_dump()["share"] == 0.25


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
    gated = make_recipe({**recipe_value(), "experts": {}, "gating": {"gate": "bayes"}})
    assert plain.deciding() == gated.deciding()
    assert make_recipe(gated.resolved()) == gated


def test_both_kinds_of_recipes_of_experts_carry_it() -> None:
    whole = make_recipe({**recipe_value(), "experts": {}, "gating": {"experts": ["cooking"]}})
    value = recipe_value()
    small = make_recipe(
        {"run": value["run"], "data": value["data"], "experts": {"base": "b"}, "gating": {"experts": ["cooking"]}}
    )
    for recipe in (whole, small):
        assert recipe.gating is not None
        assert recipe.gating.experts == ["cooking"]
        assert recipe.scores_folder == recipe.run / "scores"

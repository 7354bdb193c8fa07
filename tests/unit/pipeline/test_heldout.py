"""What the table of every model calls them, and which of them the experts are over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tiny_project import recipe_value

from weftlm.pipeline.heldout import base_of, models_of
from weftlm.pipeline.recipe import Recipe, make_recipe


def finished(folder: Path, experts: dict[str, Any] | None) -> Recipe:
    """A recipe with a baseline, both trained."""
    value = {**recipe_value(), "run": str(folder), "compare": {"mixtures": ["uniform"]}}
    project = make_recipe(value if experts is None else {**value, "experts": experts})
    for run in (project.run, project.baselines_folder / "uniform"):
        run.mkdir(parents=True, exist_ok=True)
        (run / "result.json").write_text("{}")
    return project


@pytest.mark.parametrize(
    ("experts", "names", "base"),
    [
        (None, ["base", "baseline: uniform"], None),
        ({}, ["base", "baseline: uniform"], "base"),
        ({"baseline": "uniform"}, ["mixture: dga", "baseline: uniform"], "baseline: uniform"),
        ({"base": "some/base"}, ["mixture: dga", "base", "baseline: uniform"], "base"),
    ],
    ids=["no experts", "over it", "over a baseline", "over a given model"],
)
def test_the_recipes_own_model_is_the_base_only_where_its_experts_are_over_it(
    experts: dict[str, Any] | None, names: list[str], base: str | None, tmp_path: Path
) -> None:
    project = finished(tmp_path, experts)
    found = models_of(project)
    assert list(found) == names
    assert found[names[0]].path == tmp_path / "model"
    assert [name for name, place in found.items() if place.role == "base"] == [base or "base"]
    assert base_of(project) == base
    if base is not None:
        assert str(found[base].path).endswith(project.base.removeprefix(str(tmp_path)))

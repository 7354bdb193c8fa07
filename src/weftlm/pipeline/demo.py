"""The demonstration: the whole pipeline on built-in text."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import resources
from typing import Any

import yaml

from weftlm.config import apply_overrides
from weftlm.errors import ConfigError
from weftlm.pipeline.names import SUMMARY
from weftlm.pipeline.recipe import Recipe, make_recipe
from weftlm.pipeline.runner import run_project


def demo_recipe(overrides: Sequence[str] = ()) -> Recipe:
    """The project the demonstration carries out, `demo.yaml` beside this file."""
    text = resources.files("weftlm.pipeline").joinpath("demo.yaml").read_text(encoding="utf-8")
    return make_recipe(apply_overrides(yaml.safe_load(text), overrides))


def run_demo(recipe: Recipe) -> dict[str, Any]:
    """Carry the demonstration out; what is finished is reused.

    Returns:
        summary.json as a mapping.
    Raises:
        ConfigError: a section was overridden away.
        WeftError: as `run_project`.
    """
    if not recipe.trains or not recipe.makes_experts or recipe.routing is None or recipe.gating is None:
        raise ConfigError(
            "the demonstration shows a mixture, experts, routers and a gate; keep the sections experts, routing and "
            "gating, or write a recipe of your own for weftlm run"
        )
    run_project(recipe, processes=min(2, os.cpu_count() or 1))
    summary: dict[str, Any] = json.loads((recipe.run / SUMMARY).read_text(encoding="utf-8"))
    return summary

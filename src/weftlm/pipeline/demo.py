"""The recipe of the demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import yaml

from weftlm.config import apply_overrides
from weftlm.pipeline.recipe import Recipe, make_recipe


def demo_recipe(overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of `weftlm demo`, `demo.yaml` beside this file."""
    text = resources.files("weftlm.pipeline").joinpath("demo.yaml").read_text(encoding="utf-8")
    return make_recipe(apply_overrides(yaml.safe_load(text), overrides))

"""The recipe of the demonstration; and any recipe with its sizes cut down, so that it takes about two minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import yaml

from weftlm.config import apply_overrides
from weftlm.pipeline.recipe import Recipe, make_recipe

LARGEST: Mapping[str, int] = {
    "data.domains.max_train_tokens": 10_000,
    "mixture.update_every_steps": 5,
    "training.steps": 15,
    "training.warmup_steps": 3,
    "evaluation.max_tokens_per_set": 512,
    "experts.training.steps": 8,
    "experts.training.warmup_steps": 2,
    "experts.validation_tokens": 512,
    "experts.gate.steps": 4,
    "experts.statistics_examples": 16,
    "gating.scores.sequences": 12,
    "gating.scores.samples": 8,
    "gating.fit.steps": 100,
    "gating.fit.report_every_steps": 50,
    "gating.fit.best_response_steps": 30,
    "gating.students.distil.steps": 20,
    "gating.students.distil.evaluate_every_steps": 10,
    "gating.students.direct.fit.steps": 30,
    "gating.students.dense.training.steps": 8,
}
"""Largest value of each key; smaller ones stay."""


def quick(recipe: Recipe) -> Recipe:
    """The project with small sizes, in folders of its own (`RUN-quick`): nothing of the real run is touched.

    Figures of such a run show that everything works and nothing else.
    """
    value = recipe.resolved()
    for key, most in LARGEST.items():
        *path, last = key.split(".")
        section: Any = value
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or last not in section:
            continue
        if last == "steps" and section.get("tokens") is not None:  # one of the two gives the length
            per_step = section["batch_sequences"] * section["sequence_length"]
            section["tokens"] = min(section["tokens"], most * per_step)
        else:
            section[last] = most if section[last] is None else min(section[last], most)
    if "evaluation" in value:
        value["evaluation"]["every_steps"] = None
    experts, mixture = value.get("experts") or {}, value.get("mixture") or {}
    for section, key in ((value, "run"), (value, "prepared"), (experts, "library")):
        if section.get(key) is not None:
            section[key] = f"{section[key].rstrip('/')}-quick"
    if "reference" in mixture:  # a run on other data than these
        mixture["reference"] = None
    return make_recipe(value)


def demo_recipe(overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of `weftlm demo`, `demo.yaml` beside this file."""
    text = resources.files("weftlm.pipeline").joinpath("demo.yaml").read_text(encoding="utf-8")
    return make_recipe(apply_overrides(yaml.safe_load(text), overrides))

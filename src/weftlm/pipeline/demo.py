"""The recipe of the demonstration, at its full size and cut down to be seen through in about two minutes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import yaml

from weftlm.config import apply_overrides
from weftlm.pipeline.recipe import Recipe, make_recipe

QUICK = (
    "run=runs/demo-quick",
    "data.domains.max_train_tokens=10000",
    "mixture.update_every_steps=5",
    "training.tokens=30720",
    "training.warmup_steps=3",
    "evaluation.every_steps=null",
    "evaluation.max_tokens_per_set=512",
    "experts.training.steps=8",
    "experts.training.warmup_steps=2",
    "experts.validation_tokens=512",
    "experts.gate.steps=4",
    "experts.statistics_examples=16",
    "gating.scores.sequences=12",
    "gating.scores.samples=8",
    "gating.fit.steps=100",
    "gating.fit.report_every_steps=50",
    "gating.fit.best_response_steps=30",
    "gating.students.distil.steps=20",
    "gating.students.distil.evaluate_every_steps=10",
)
"""Small sizes, in a run folder of their own: figures of such a run show that everything works and nothing else."""


def demo_recipe(overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of `weftlm demo`, `demo.yaml` beside this file."""
    text = resources.files("weftlm.pipeline").joinpath("demo.yaml").read_text(encoding="utf-8")
    return make_recipe(apply_overrides(yaml.safe_load(text), overrides))

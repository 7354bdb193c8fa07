"""Settings that sections of a recipe take from one another where they are not given, resolved once.

A resolved recipe, and with it the identity of every run, holds the values and not where they came from.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from weftlm.config import Section
from weftlm.distillation.config import DistilConfig
from weftlm.evaluation.config import EvaluationConfig
from weftlm.experts.config import AdapterTraining
from weftlm.gating.config import FitConfig, ScoreConfig
from weftlm.models.config import LoRASection, ModelConfig
from weftlm.training.config import TrainingConfig

_MACHINE = ("precision", "device", "compile", "threads")
_BATCH = ("batch_sequences", "micro_batch_sequences")

INHERITED: tuple[tuple[str, type[Section], str, tuple[str, ...]], ...] = (
    ("training", TrainingConfig, "experts.training", ("sequence_length", *_BATCH, *_MACHINE)),
    ("model", ModelConfig, "experts", ("dtype",)),
    ("model.lora", LoRASection, "experts.lora", ("rank", "alpha", "dropout", "target_modules")),
    ("training", TrainingConfig, "gating.scores", ("sequence_length -> length", "precision")),
    ("experts.training", AdapterTraining, "gating.scores", ("sequence_length -> length", "precision")),
    ("evaluation", EvaluationConfig, "gating.scores", ("batch_size",)),
    ("training", TrainingConfig, "gating.students.dense.training", (*_BATCH, *_MACHINE)),
    ("experts.training", AdapterTraining, "gating.students.dense.training", (*_BATCH, *_MACHINE)),
    ("gating.scores", ScoreConfig, "gating.students.dense.training", ("length -> sequence_length",)),
)
"""Section, its class, the section that takes keys from it, and the keys (`name there -> name here` where they differ).

Of two lines about one key the last counts. A section that is not in a recipe gives nothing: the other keeps its own
default.
"""


def inherit(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe, as a user wrote it and without mistakes, with every setting that a section takes from another.

    Beside `INHERITED`: adapters of the experts that follow `model.lora` are trained with the learning rate of
    `training` too; and where `experts.training.steps` is given, `gating.scores.sequences` and `samples`,
    `gating.fit.steps` and `gating.students.distil.steps`, unless given, are at most 8 (but 32 in all), 100 and 20 times
    as many.
    """
    made: dict[str, Any] = copy.deepcopy(dict(recipe))
    lines = list(INHERITED)
    if isinstance(_at(made, "model.lora"), dict):
        lines.append(("training", TrainingConfig, "experts.training", ("lr",)))
    given = {(line[2], own) for line in lines for own in _at(made, line[2]) or ()}
    for source, section, target, keys in lines:
        written = _at(made, source)
        here = None if written is None else _made(made, target)
        if here is None:
            continue
        for name, own in map(names_of, keys):
            if (target, own) not in given:
                here[own] = written.get(name, section.model_fields[name].default)
    if type(steps := _at(made, "experts.training.steps")) is int:
        for target, key, section, most in (
            ("gating.scores", "sequences", ScoreConfig, max(32, 8 * steps)),
            ("gating.scores", "samples", ScoreConfig, max(32, 8 * steps)),
            ("gating.fit", "steps", FitConfig, 100 * steps),
            ("gating.students.distil", "steps", DistilConfig, 20 * steps),
        ):
            if (here := _made(made, target)) is not None:
                here.setdefault(key, min(most, section.model_fields[key].default))
    return made


def names_of(key: str) -> tuple[str, str]:
    """A key's name where it comes from, and where it goes to."""
    name, _, own = key.partition(" -> ")
    return name, own or name


def _at(value: Any, place: str) -> Any:
    """What is at a dotted place of nested mappings; None where nothing is."""
    for part in place.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _made(value: dict[str, Any], place: str) -> dict[str, Any] | None:
    """The section at a dotted place, made where it is absent; None where its parent has none of it.

    A section is made only in one that has it by default: not a stage (`experts`, `gating`), nor `dense`.
    """
    here = value
    for part in place.split("."):
        if here.get(part) is None:
            if part in ("experts", "gating", "dense"):
                return None
            here[part] = {}
        here = here[part]
    return here

"""The stages of a project, declared once: what each needs, what decides it, what it leaves, how it is carried out.

prepare -> train -> rivals -> experts -> route -> score -> gate -> distil -> evaluate -> report
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weftlm.config import settings
from weftlm.evaluation.task_files import task_files
from weftlm.files import SEAL, remove
from weftlm.gating.config import MANIFEST as GATED
from weftlm.pipeline.identity import MANIFEST, data_identity
from weftlm.pipeline.names import CERTIFICATE, EVALUATION, FIT, GATE, REPORT, ROUTING, STUDENT, SUMMARY
from weftlm.pipeline.recipe import MONOLITH, Recipe
from weftlm.routing.config import MANIFEST as ROUTED
from weftlm.training.config import NOT_DECIDING


@dataclass(frozen=True)
class Call:
    """How a stage is asked to work.

    Attributes:
        replace: discard what is there of other settings.
        processes: experts made at once.
        progress: show progress on stderr.
    """

    replace: bool = False
    processes: int = 1
    progress: bool = True


@dataclass(frozen=True)
class Stage:
    """One step of a project.

    Attributes:
        name: as `--from` and `--until` take it.
        title: what it does, in a few words.
        needs: stages whose results it reads.
        wanted: whether a project has it.
        settings: all in the recipe that decides its result, as JSON values.
        outputs: files that are there when it is done, in the order of reading.
        work: carry it out; continues what was interrupted, keeps what is finished.
        discard: files and folders that are removed before it is made anew.
        costly: whether its result is replaced only when that is asked for.
        shared: whether torchrun's processes share its work; the others leave it to the first.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    wanted: Callable[[Recipe], bool]
    settings: Callable[[Recipe], Any]
    outputs: Callable[[Recipe], Sequence[Path]]
    work: Callable[[Recipe, Call], Any]
    discard: Callable[[Recipe], Sequence[Path]] = lambda recipe: ()
    costly: bool = False
    shared: bool = False

    def clear(self, recipe: Recipe) -> None:
        """Remove what an earlier making left: first that by which it is known to be done."""
        discarded = self.discard(recipe)
        for path in self.outputs(recipe) if discarded else ():
            remove(path)
        for path in discarded:
            remove(path)


# -- what decides each --------------------------------------------------------------------------------------------


def _rivals(recipe: Recipe) -> dict[str, Any]:
    found = {policy.policy: recipe.rival(policy).deciding() for policy in recipe.compare.mixtures}
    if recipe.trains_monolith:
        experts = recipe.expert_settings
        found[MONOLITH] = {
            "tokens": experts.training.total_tokens,
            **settings(experts, only=("base", "rival", "revision", "domains")),
        }
    return found


def _experts(recipe: Recipe) -> dict[str, Any]:
    experts = recipe.expert_settings
    return {
        "seed": recipe.seed,
        "experts": settings(experts, without=("library", "training")),
        "training": settings(experts.training, without=NOT_DECIDING),
    }


def _gating(*keys: str) -> Callable[[Recipe], Any]:
    return lambda recipe: {"seed": recipe.seed, "gating": settings(recipe.gating_settings, only=keys)}


def _scores(recipe: Recipe) -> Any:
    return {**_gating("scores", "experts", "pool", "domains")(recipe), "dtype": recipe.expert_settings.dtype}


def _evaluation(recipe: Recipe) -> dict[str, Any]:
    """The `evaluation` section, and what the files of its tasks hold."""
    files = task_files(recipe.evaluation.tasks)
    section = settings(recipe.evaluation, without=("every_steps",))
    return {"evaluation": section, **({"task_files": files} if files else {})}


def _table(recipe: Recipe) -> dict[str, Any]:
    """How models are measured, and which stages make them."""
    found = {**_evaluation(recipe), "stages": _names(recipe)}
    if not recipe.has_experts:
        return found
    experts = recipe.expert_settings
    return {
        **found, "dtype": experts.dtype, "examples": experts.examples,
        "sequence_length": experts.training.sequence_length,
    }  # fmt: skip


def _names(recipe: Recipe) -> list[str]:
    return [stage.name for stage in STAGES if stage.wanted(recipe)]


def _routing(recipe: Recipe) -> Any:
    return {"routing": settings(recipe.routing_settings), **_evaluation(recipe)}


def _routed(recipe: Recipe) -> list[Path]:
    """The comparison, and each routed model."""
    folders = [recipe.routed_folder(each) for each in recipe.routing_settings.build]
    return [recipe.run / ROUTING, *(folder / name for name in (ROUTED, SEAL) for folder in folders)]


# -- what each does -----------------------------------------------------------------------------------------------


def _work(name: str) -> Callable[[Recipe, Call], Any]:
    """A function of `work.py`, whose libraries are imported when a stage is carried out and not when one is listed."""

    def carry_out(recipe: Recipe, call: Call) -> Any:
        return getattr(importlib.import_module("weftlm.pipeline.work"), name)(recipe, call)

    return carry_out


def _has_gate(recipe: Recipe) -> bool:
    return recipe.has_experts and recipe.gating is not None


_TRAINED = (
    "checkpoints", "metrics.jsonl", "model", "result.json", "run.json", "recipe.yaml", "windows.safetensors",
    "reference", "tensorboard",
)  # fmt: skip

STAGES: tuple[Stage, ...] = (
    Stage(
        "prepare",
        "corpora to domains and tokens",
        (),
        lambda recipe: True,
        lambda recipe: data_identity(recipe.data),
        lambda recipe: [recipe.prepared_folder / MANIFEST],
        _work("prepare_data"),
        costly=True,
        shared=True,
    ),
    Stage(
        "train",
        "the base, on its mixture",
        ("prepare",),
        lambda recipe: recipe.trains,
        Recipe.deciding,
        lambda recipe: [recipe.run / "result.json", recipe.run / "model" / SEAL],
        _work("train_base"),
        lambda recipe: [recipe.run / name for name in _TRAINED],
        costly=True,
        shared=True,
    ),
    Stage(
        "rivals",
        "other mixtures and the monolith",
        ("prepare", "train"),
        lambda recipe: bool(recipe.compare.mixtures) or recipe.trains_monolith,
        _rivals,
        lambda recipe: [
            recipe.rivals_folder / name / each for each in ("result.json", f"model/{SEAL}") for name in _rivals(recipe)
        ],
        _work("make_rivals"),
        lambda recipe: [recipe.rivals_folder],
        costly=True,
        shared=True,
    ),
    Stage(
        "experts",
        "an expert per domain, with its gate",
        ("prepare", "train", "rivals"),
        lambda recipe: recipe.makes_experts,
        _experts,
        lambda recipe: [recipe.library_folder / "library.json"],
        _work("make_experts"),
        costly=True,
        shared=True,
    ),
    Stage(
        "route",
        "routers compared, routed models written",
        ("prepare", "experts"),
        lambda recipe: recipe.makes_experts and recipe.routing is not None,
        _routing,
        _routed,
        _work("compare_routers"),
        lambda recipe: [recipe.run / ROUTING, recipe.run / "routed"],
    ),
    Stage(
        "score",
        "text and samples under every expert",
        ("prepare", "experts"),
        _has_gate,
        _scores,
        lambda recipe: [recipe.scores_folder / "index.json"],
        _work("score_text"),
        costly=True,
        shared=True,
    ),
    Stage(
        "gate",
        "the robust gate and its certificate",
        ("score",),
        _has_gate,
        _gating("gate", "fit", "offsets", "mixtures", "held_out_fraction"),
        lambda recipe: [recipe.gate_folder / name for name in (FIT, CERTIFICATE, GATE)],
        _work("fit_and_certify"),
        lambda recipe: [recipe.gate_folder],
    ),
    Stage(
        "distil",
        "causal students that can be served",
        ("score", "gate"),
        _has_gate,
        _gating("students"),
        lambda recipe: [
            recipe.students_folder / name for name in ("student.json", f"{STUDENT}/{GATED}", f"{STUDENT}/{SEAL}")
        ],
        _work("distil_students"),
        lambda recipe: [recipe.students_folder],
    ),
    Stage(
        "evaluate",
        "every model on the same held-out text",
        ("prepare", "train", "rivals", "experts", "route", "distil"),
        lambda recipe: True,
        _table,
        lambda recipe: [recipe.run / EVALUATION],
        _work("evaluate"),
        lambda recipe: [recipe.run / EVALUATION],
    ),
    Stage(
        "report",
        "one page and one summary",
        ("train", "rivals", "route", "gate", "distil", "evaluate"),
        lambda recipe: True,
        _names,
        lambda recipe: [recipe.run / REPORT, recipe.run / SUMMARY],
        _work("report"),
        lambda recipe: [recipe.run / REPORT, recipe.run / SUMMARY],
    ),
)
"""In the order in which they are carried out."""


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages a project has; experts wait for the rivals only where one of them is their base."""
    found = [stage for stage in STAGES if stage.wanted(recipe)]
    if not recipe.has_experts or recipe.expert_settings.rival is None:
        found = [
            replace(stage, needs=tuple(name for name in stage.needs if name != "rivals"))
            if stage.name == "experts"
            else stage
            for stage in found
        ]
    return tuple(found)

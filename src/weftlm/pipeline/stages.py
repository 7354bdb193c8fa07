"""The stages of a project, declared once: what each needs, what decides it, what it leaves, how it is carried out.

prepare -> train -> rivals -> experts -> route -> score -> gate -> distil -> evaluate -> report
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weftlm.evaluation.task_files import task_files
from weftlm.files import SEAL, remove
from weftlm.gating.config import MANIFEST as GATED
from weftlm.pipeline.expert_recipe import gating_config, routed_folder, routing_config
from weftlm.pipeline.identity import MANIFEST, data_identity
from weftlm.pipeline.names import CERTIFICATE, EVALUATION, FIT, GATE, REPORT, ROUTING, STUDENT, SUMMARY
from weftlm.pipeline.project import MONOLITH, Project
from weftlm.pipeline.recipe import Recipe
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
    wanted: Callable[[Project], bool]
    settings: Callable[[Project], Any]
    outputs: Callable[[Project], Sequence[Path]]
    work: Callable[[Project, Call], Any]
    discard: Callable[[Project], Sequence[Path]] = lambda project: ()
    costly: bool = False
    shared: bool = False

    def clear(self, project: Project) -> None:
        """Remove what an earlier making left: first that by which it is known to be done."""
        discarded = self.discard(project)
        for path in self.outputs(project) if discarded else ():
            remove(path)
        for path in discarded:
            remove(path)


# -- what decides each --------------------------------------------------------------------------------------------


def _training(recipe: Recipe) -> dict[str, Any]:
    """A recipe's part of a training: what decides its weights, and not how they are measured."""
    value = recipe.resolved()
    kept = {key: value[key] for key in ("seed", "model", "mixture", "alignment", "training")}
    kept["training"] = {key: each for key, each in kept["training"].items() if key not in NOT_DECIDING}
    return kept


def _rivals(project: Project) -> dict[str, Any]:
    found = {policy.policy: _training(project.rival(policy)) for policy in project.mixtures}
    if project.monolith:
        experts = project.pool_recipe.experts
        found[MONOLITH] = {
            "tokens": experts.training.total_tokens,
            **experts.model_dump(mode="json", include={"base", "rival", "revision", "domains"}),
        }
    return found


def _experts(project: Project) -> dict[str, Any]:
    value = project.pool_recipe.experts.model_dump(mode="json", exclude={"library"})
    for key in NOT_DECIDING:
        value["training"].pop(key, None)
    return {"seed": project.pool_recipe.seed, **value}


def _gating(*keys: str) -> Callable[[Project], Any]:
    def settings(project: Project) -> Any:
        section = gating_config(project.pool_recipe)
        return {"seed": project.pool_recipe.seed, **section.model_dump(mode="json", include=set(keys))}

    return settings


def _scores(project: Project) -> Any:
    return {**_gating("scores", "experts", "pool", "domains")(project), "dtype": project.pool_recipe.experts.dtype}


def _evaluation(project: Project) -> dict[str, Any]:
    """The `evaluation` section, and what the files of its tasks hold."""
    files = task_files(project.evaluation.tasks)
    section = project.evaluation.model_dump(mode="json", exclude={"every_steps"})
    return {**section, **({"task_files": files} if files else {})}


def _table(project: Project) -> dict[str, Any]:
    """How models are measured, and which stages make them."""
    found = {**_evaluation(project), "stages": _names(project)}
    if project.parts is None:
        return found
    experts = project.parts.experts.model_dump(mode="json", include={"dtype", "examples"})
    return {**found, **experts, "sequence_length": project.parts.experts.training.sequence_length}


def _names(project: Project) -> list[str]:
    return [stage.name for stage in STAGES if stage.wanted(project)]


def _routing(project: Project) -> Any:
    routing = routing_config(project.pool_recipe).model_dump(mode="json")
    return {"routing": routing, "evaluation": _evaluation(project)}


def _routed(project: Project) -> list[Path]:
    """The comparison, and each routed model."""
    recipe = project.pool_recipe
    folders = [routed_folder(recipe, each) for each in routing_config(recipe).build]
    return [project.run / ROUTING, *(folder / name for name in (ROUTED, SEAL) for folder in folders)]


# -- what each does -----------------------------------------------------------------------------------------------


def _work(name: str) -> Callable[[Project, Call], Any]:
    """A function of `work.py`, whose libraries are imported when a stage is carried out and not when one is listed."""

    def carry_out(project: Project, call: Call) -> Any:
        return getattr(importlib.import_module("weftlm.pipeline.work"), name)(project, call)

    return carry_out


def _has_gate(project: Project) -> bool:
    return project.parts is not None and project.parts.gating is not None


_TRAINED = (
    "checkpoints", "metrics.jsonl", "model", "result.json", "run.json", "recipe.yaml", "windows.safetensors",
    "reference", "tensorboard",
)  # fmt: skip

STAGES: tuple[Stage, ...] = (
    Stage(
        "prepare",
        "corpora to domains and tokens",
        (),
        lambda project: True,
        lambda project: data_identity(project.data),
        lambda project: [project.prepared_folder / MANIFEST],
        _work("prepare_data"),
        costly=True,
        shared=True,
    ),
    Stage(
        "train",
        "the base, on its mixture",
        ("prepare",),
        lambda project: project.whole is not None,
        lambda project: _training(project.base_recipe),
        lambda project: [project.run / "result.json", project.run / "model" / SEAL],
        _work("train_base"),
        lambda project: [project.run / name for name in _TRAINED],
        costly=True,
        shared=True,
    ),
    Stage(
        "rivals",
        "other mixtures and the monolith",
        ("prepare", "train"),
        lambda project: bool(project.mixtures) or project.monolith,
        _rivals,
        lambda project: [
            project.rivals_folder / name / each
            for each in ("result.json", f"model/{SEAL}")
            for name in _rivals(project)
        ],
        _work("make_rivals"),
        lambda project: [project.rivals_folder],
        costly=True,
        shared=True,
    ),
    Stage(
        "experts",
        "an expert per domain, with its gate",
        ("prepare", "train", "rivals"),
        lambda project: project.makes_experts,
        _experts,
        lambda project: [project.pool_recipe.library_folder / "library.json"],
        _work("make_experts"),
        costly=True,
        shared=True,
    ),
    Stage(
        "route",
        "routers compared, routed models written",
        ("prepare", "experts"),
        lambda project: project.makes_experts and project.pool_recipe.routing is not None,
        _routing,
        _routed,
        _work("compare_routers"),
        lambda project: [project.run / ROUTING, project.run / "routed"],
    ),
    Stage(
        "score",
        "text and samples under every expert",
        ("prepare", "experts"),
        _has_gate,
        _scores,
        lambda project: [project.pool_recipe.scores_folder / "index.json"],
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
        lambda project: [project.pool_recipe.gate_folder / name for name in (FIT, CERTIFICATE, GATE)],
        _work("fit_and_certify"),
        lambda project: [project.pool_recipe.gate_folder],
    ),
    Stage(
        "distil",
        "causal students that can be served",
        ("score", "gate"),
        _has_gate,
        _gating("students"),
        lambda project: [
            project.pool_recipe.students_folder / name
            for name in ("student.json", f"{STUDENT}/{GATED}", f"{STUDENT}/{SEAL}")
        ],
        _work("distil_students"),
        lambda project: [project.pool_recipe.students_folder],
    ),
    Stage(
        "evaluate",
        "every model on the same held-out text",
        ("prepare", "train", "rivals", "experts", "route", "distil"),
        lambda project: True,
        _table,
        lambda project: [project.run / EVALUATION],
        _work("evaluate"),
        lambda project: [project.run / EVALUATION],
    ),
    Stage(
        "report",
        "one page and one summary",
        ("train", "rivals", "route", "gate", "distil", "evaluate"),
        lambda project: True,
        _names,
        lambda project: [project.run / REPORT, project.run / SUMMARY],
        _work("report"),
        lambda project: [project.run / REPORT, project.run / SUMMARY],
    ),
)
"""In the order in which they are carried out."""


def stages_of(project: Project) -> tuple[Stage, ...]:
    """The stages a project has; experts wait for the rivals only where one of them is their base."""
    found = [stage for stage in STAGES if stage.wanted(project)]
    if project.parts is None or project.parts.experts.rival is None:
        found = [
            replace(stage, needs=tuple(name for name in stage.needs if name != "rivals"))
            if stage.name == "experts"
            else stage
            for stage in found
        ]
    return tuple(found)

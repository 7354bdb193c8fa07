"""Carry a project through its stages: skip what is done, resume what was interrupted, say what is stale.

A stage is stale when its settings or texts have changed, when an earlier stage was replaced, or when what it left was
changed or removed. It is then made again; but a costly one (data, a training, experts, scores) whose settings have
changed is replaced only on request (`from_stage`), so that no result is lost by editing a recipe.

<run>/stages/NAME.json      record of a finished stage (`weftlm.artifact`), with the digests of what it left
<run>/stages/.NAME.begun.json   the same of one that has begun, failed or is due
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from weftlm import interrupt
from weftlm.artifact import is_locked
from weftlm.config import differences
from weftlm.errors import ConfigError, DataError, WeftError, did_you_mean, reason
from weftlm.files import check_listed, checksum, write_whole
from weftlm.pipeline.checks import check_recipe
from weftlm.pipeline.recipe import Recipe, kept_recipe
from weftlm.pipeline.run_folder import LOCK, alone
from weftlm.pipeline.stage import Stage, StageOptions, stages_of
from weftlm.progress import write_line

if TYPE_CHECKING:
    from accelerate import PartialState

State = Literal["done", "running", "interrupted", "failed", "stale", "to do"]
Act = Literal["skip", "run", "continue", "replace", "refuse"]


@dataclass(frozen=True)
class StageStatus:
    """The state of a stage.

    Attributes:
        stage: The stage.
        state: done, running, interrupted, failed, stale, or to do.
        why: What makes it stale, or the message of a failure; empty otherwise.
        settled: Whether its settings and what it reads are as they were, so that nothing of it need be discarded; False
            too where that was requested and is still to come.
        facts: Its record; empty where it never began.
    """

    stage: Stage
    state: State
    why: str = ""
    settled: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def digest(self) -> str | None:
        """A digest of all that it left; None where it is not finished."""
        return checksum(self.facts["files"]) if "files" in self.facts else None

    @property
    def act(self) -> Act:
        """What a run does with the stage."""
        if self.state == "to do":
            return "run" if self.settled else "replace"
        if self.state == "stale":
            return "replace" if not self.stage.costly else "run" if self.settled else "refuse"
        acts: Mapping[State, Act] = {"done": "skip", "running": "refuse"}
        return acts.get(self.state, "continue")

    def to_json(self) -> dict[str, Any]:
        """As JSON values, with the seconds it took and the time at which it ended, UTC."""
        return {
            "stage": self.stage.name, "title": self.stage.title, "state": self.state, "why": self.why,
            "seconds": self.facts.get("seconds"), "ended": self.facts.get("ended"),
        }  # fmt: skip


def project_status(recipe: Recipe) -> list[StageStatus]:
    """The state of every stage of a project; reads nothing but the run folder and the state of the inputs.

    Raises:
        DataError: A record is torn, or an input is missing.
    """
    busy = is_locked(recipe.run / LOCK)
    found: dict[str, StageStatus] = {}
    for stage in stages_of(recipe):
        found[stage.name] = _status(recipe, stage, found, busy)
    return list(found.values())


def _status(recipe: Recipe, stage: Stage, earlier: Mapping[str, StageStatus], busy: bool = False) -> StageStatus:
    """The state of a stage, given those of the stages before it."""
    known = stage.known(recipe)
    if known is None:
        return StageStatus(stage, "to do")
    finished, facts = known
    if facts.get("due"):
        return StageStatus(stage, "to do", settled=False)
    before = [earlier[name] for name in stage.needed(recipe) if name in earlier]
    needs = {each.stage.name: each.digest for each in before if each.digest is not None}
    replaced = (f"{name} was replaced" for name, digest in needs.items() if facts.get("needs", {}).get(name) != digest)
    why = differences(facts.get("identity", {}), stage.settings(recipe), most=3) or next(replaced, "")
    if why:
        return StageStatus(stage, "stale", why, settled=False, facts=facts)
    if not finished:
        state: State = "failed" if "message" in facts else "running" if busy else "interrupted"
        return StageStatus(stage, state, facts.get("message", ""), facts=facts)
    why = next((f"{path} is gone" for path in stage.outputs(recipe) if not path.exists()), "")
    try:
        if not why:
            check_listed(recipe.stages_folder, facts["files"], "it is made again")
    except DataError as error:
        why = str(error)
    why = why or next((f"{each.stage.name} is {each.state}" for each in before if each.state != "done"), "")
    return StageStatus(stage, "stale" if why else "done", why, facts=facts)


def plan_stages(
    recipe: Recipe, *, from_stage: str | None = None, until: str | None = None
) -> list[tuple[StageStatus, Act]]:
    """What `run_project` would do with each stage, as far as can be said beforehand.

    Raises:
        ConfigError: No such stage, `from_stage` comes after `until`, or a stage before `from_stage` is not done.
    """
    found = project_status(recipe)
    names = [status.stage.name for status in found]
    for option, name in (("--from", from_stage), ("--until", until)):
        if name is not None and name not in names:
            raise ConfigError(f"{option} {name}: this project has no such stage{did_you_mean(name, names)}")
    last = len(names) if until is None else names.index(until) + 1
    if from_stage is None:
        return [(status, status.act) for status in found[:last]]
    first = names.index(from_stage)
    if first >= last:
        raise ConfigError(f"--from {from_stage} comes after --until {until}; there is nothing between them")
    for status in found[:first]:
        if status.state != "done":
            raise ConfigError(
                f"--from {from_stage}: the stage {status.stage.name} before it is not done "
                f"({': '.join(filter(None, (status.state, status.why)))}); start there, or leave --from out"
            )
    again = [(status, status.act if status.state == "to do" else "replace") for status in found[first:last]]
    return [*((status, status.act) for status in found[:first]), *again]


def run_project(
    recipe: Recipe,
    *,
    from_stage: str | None = None,
    until: str | None = None,
    processes: int = 1,
    progress: bool = True,
) -> list[StageStatus]:
    """Carry a project through its stages; what is done and unchanged is skipped, what was interrupted continues.

    Started by torchrun, the processes share the stages that can be shared; the first does the others.

    Args:
        recipe: The recipe.
        from_stage: First stage to replace, with all later ones; those before it must be done.
        until: Last stage to carry out.
        processes: Number of experts made at once.
        progress: Whether to show a line per stage on stderr, and what the stages themselves show.
    Returns:
        The state of every stage afterwards.
    Raises:
        ConfigError: As `check_recipe` and `plan_stages`; or a costly stage is stale and its replacement not requested.
        CheckpointError: Another process is at work in the run folder.
        WeftError: A stage failed; what it and those before it finished stays, and the next run continues.
    """
    check_recipe(recipe, ask=True)
    group = _group(recipe)
    first = group is None or bool(group.is_main_process)

    def together() -> None:
        if group is not None:
            group.wait_for_everyone()

    with alone(recipe.run) if first else nullcontext():
        together()
        planned = plan_stages(recipe, from_stage=from_stage, until=until)
        for status, act in planned:
            _refuse(status, act)
            if act != "skip":
                status.stage.settings(recipe)  # a missing input is reported now, not after hours
        together()
        if first:
            recipe.stages_folder.mkdir(exist_ok=True)
            write_whole(kept_recipe(recipe.run), recipe.to_yaml())
            for status, act in planned if from_stage is not None else ():
                if act == "replace":  # which goes on without --from where this run is cut short
                    status.stage.record(recipe).begin(due=True)
        together()
        known: dict[str, StageStatus] = {}
        for number, stage in enumerate(status.stage for status, _ in planned):
            status = _status(recipe, stage, known)
            _refuse(status, status.act)
            replace = status.act == "replace" or (status.act == "continue" and bool(status.facts.get("replace")))
            if status.act == "replace" and first:
                stage.clear(recipe)
            together()
            if progress and first:
                doing = "done already" if status.act == "skip" else stage.title
                write_line(f"stage {number + 1} of {len(planned)}, {stage.name}: {doing}")
            if status.act != "skip" and (first or stage.shared):
                options = StageOptions(replace, processes, progress and first)
                _carry_out(recipe, stage, options, known, keep=first)
            together()
            known[stage.name] = StageStatus(stage, "done", facts=(stage.known(recipe) or (True, {}))[1])
    return project_status(recipe)


def _group(recipe: Recipe) -> PartialState | None:
    """The process group torchrun started this process in; None for a process on its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from weftlm.pipeline.experts import process_group  # noqa: PLC0415 - torch

    return process_group(recipe)


def _refuse(status: StageStatus, act: Act) -> None:
    if act == "refuse" and status.state == "stale":
        raise ConfigError(
            f"the stage {status.stage.name} was made of something else ({status.why}); replace it and what follows "
            f"with weftlm run --from {status.stage.name}, which discards what is there, or choose another run folder"
        )


def _carry_out(
    recipe: Recipe, stage: Stage, options: StageOptions, earlier: Mapping[str, StageStatus], *, keep: bool
) -> None:
    """Run one stage and, with `keep`, write its record."""
    start, record = time.perf_counter(), stage.record(recipe)
    needs = {name: earlier[name].digest for name in stage.needed(recipe) if name in earlier}
    notes: dict[str, Any] = {"needs": needs, "began": _now(), "replace": options.replace}

    def ended() -> dict[str, Any]:
        return {**notes, "ended": _now(), "seconds": time.perf_counter() - start}

    if keep:
        record.begin(**notes)
    if options.replace:
        interrupt.done_with("--from")
    try:
        stage.work(recipe, options)
        if keep:
            record.finish(ended(), stage.left(recipe))
    except (WeftError, OSError) as error:
        if keep:
            record.begin(**ended(), message=reason(error))
        raise


def _now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")

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
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from weftlm import interrupt
from weftlm.config import differences
from weftlm.errors import ConfigError, DataError, WeftError, did_you_mean, reason
from weftlm.files import check_listed, write_whole
from weftlm.pipeline.checks import check_recipe
from weftlm.pipeline.recipe import Recipe, kept_recipe
from weftlm.pipeline.run_folder import alone, at_work
from weftlm.pipeline.stage import Stage, StageOptions, digest_of, read_stage, stages_of
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
        seconds: Time it took, where it is done.
        ended: Time at which it ended, UTC.
        settled: Whether its settings and what it reads are as they were, so that nothing of it need be discarded; False
            too where that was requested and is still to come.
    """

    stage: Stage
    state: State
    why: str = ""
    seconds: float | None = None
    ended: str | None = None
    settled: bool = True

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "stage": self.stage.name, "title": self.stage.title, "state": self.state, "why": self.why,
            "seconds": self.seconds, "ended": self.ended,
        }  # fmt: skip


def project_status(recipe: Recipe) -> list[StageStatus]:
    """The state of every stage of a project; reads nothing but the run folder and the state of the inputs.

    Raises:
        DataError: A record is torn, or an input is missing.
    """
    busy = at_work(recipe.run)
    found: dict[str, StageStatus] = {}
    for stage in stages_of(recipe):
        found[stage.name] = _status(recipe, stage, found, busy)
    return list(found.values())


def _status(recipe: Recipe, stage: Stage, earlier: Mapping[str, StageStatus], busy: bool) -> StageStatus:
    read = read_stage(recipe, stage.name)
    if read is None:
        return StageStatus(stage, "to do")
    finished, facts = read
    if facts.get("due"):
        return StageStatus(stage, "to do", settled=False)
    times = {"seconds": facts.get("seconds", 0.0), "ended": facts.get("ended")}
    why = differences(facts.get("identity", {}), stage.settings(recipe), most=3)
    for name in () if why else stage.needed(recipe):
        before = _finished(recipe, name)
        if before is not None and facts.get("needs", {}).get(name) != digest_of(before):
            why = f"{name} was replaced"
            break
    if why:
        return StageStatus(stage, "stale", why, **times, settled=False)
    if not finished and "message" in facts:
        return StageStatus(stage, "failed", facts["message"], **times)
    if not finished:
        return StageStatus(stage, "running" if busy else "interrupted")
    why = _moved(recipe, stage, facts, earlier)
    return StageStatus(stage, "stale" if why else "done", why, **times)


def _finished(recipe: Recipe, name: str) -> dict[str, Any] | None:
    """The record of a finished stage; None where it is not finished."""
    read = read_stage(recipe, name)
    return read[1] if read is not None and read[0] else None


def seconds_of(recipe: Recipe, name: str) -> float | None:
    """Time that a finished stage took; None where it is not finished."""
    found = _finished(recipe, name)
    return None if found is None else float(found["seconds"])


def _moved(recipe: Recipe, stage: Stage, facts: Mapping[str, Any], earlier: Mapping[str, StageStatus]) -> str:
    """Why a finished stage counts no more though what decides it is as it was; empty where it counts."""
    for path in stage.outputs(recipe):
        if not path.exists():
            return f"{path} is gone"
    try:
        check_listed(recipe.stages_folder, facts["files"], "it is made again")
    except DataError as error:
        return str(error)
    for name in stage.needed(recipe):
        if name in earlier and earlier[name].state != "done":
            return f"{name} is {earlier[name].state}"
    return ""


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
    first = len(names) if from_stage is None else names.index(from_stage)
    last = len(names) if until is None else names.index(until) + 1
    if from_stage is not None and first >= last:
        raise ConfigError(f"--from {from_stage} comes after --until {until}; there is nothing between them")
    for status in found[:first] if from_stage is not None else ():
        if status.state != "done":
            raise ConfigError(
                f"--from {from_stage}: the stage {status.stage.name} before it is not done "
                f"({': '.join(filter(None, (status.state, status.why)))}); start there, or leave --from out"
            )
    return [(status, _act(status, again=place >= first)) for place, status in enumerate(found[:last])]


def _act(status: StageStatus, *, again: bool) -> Act:
    if status.state == "to do":
        return "run" if status.settled else "replace"
    if again:
        return "replace"
    if status.state == "stale" and status.stage.costly:
        return "run" if status.settled else "refuse"
    if status.state == "stale":
        return "replace"
    return _ACTS[status.state]


_ACTS: dict[State, Act] = {"done": "skip", "running": "refuse", "interrupted": "continue", "failed": "continue"}


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
        known: dict[str, StageStatus] = {}
        for number, (status, act) in enumerate(planned):
            if from_stage is None or act != "replace":
                status = _status(recipe, status.stage, known, busy=False)
                act = _act(status, again=False)
                _refuse(status, act)
            if act == "replace" and first:
                status.stage.clear(recipe)
            together()
            if progress and first:
                doing = "done already" if act == "skip" else status.stage.title
                write_line(f"stage {number + 1} of {len(planned)}, {status.stage.name}: {doing}")
            if act != "skip" and (first or status.stage.shared):
                replace = _replaces(recipe, status.stage, act)
                options = StageOptions(replace=replace, processes=processes, progress=progress and first)
                _carry_out(recipe, status.stage, options, keep=first)
            together()
            known[status.stage.name] = StageStatus(status.stage, "done")
    return project_status(recipe)


def _group(recipe: Recipe) -> PartialState | None:
    """The process group torchrun started this process in; None for a process on its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import PartialState  # noqa: PLC0415 - torch

    from weftlm.pipeline.experts import process_group  # noqa: PLC0415 - torch

    return process_group(recipe) if recipe.has_experts else PartialState()


def _refuse(status: StageStatus, act: Act) -> None:
    name = status.stage.name
    if act == "refuse" and status.state == "stale":
        raise ConfigError(
            f"the stage {name} was made of something else ({status.why}); replace it and what follows with weftlm "
            f"run --from {name}, which discards what is there, or choose another run folder"
        )


def _replaces(recipe: Recipe, stage: Stage, act: Act) -> bool:
    """Whether a stage discards what is there of other settings, on request now or in the run that it resumes."""
    if act != "continue":
        return act == "replace"
    read = read_stage(recipe, stage.name)
    return read is not None and bool(read[1].get("replace"))


def _carry_out(recipe: Recipe, stage: Stage, options: StageOptions, *, keep: bool) -> None:
    """Run one stage and keep its record."""
    start, record = time.perf_counter(), stage.record(recipe)
    records = {name: _finished(recipe, name) for name in stage.needed(recipe)}
    notes: dict[str, Any] = {
        "needs": {name: digest_of(found) for name, found in records.items() if found is not None},
        "began": _now(),
        "replace": options.replace,
    }

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

"""Carry a project through its stages: skip what is done, continue what was interrupted, say what is stale.

A stage is stale when its settings or texts have changed, when an earlier stage was made anew, or when what it left was
changed or removed. It is then made again; but a costly one (data, a training, experts, scores) whose settings have
changed is replaced only when that is asked for (`from_stage`), so that no result is lost by editing a recipe.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from weftlm import interrupt
from weftlm.config import differences
from weftlm.errors import ConfigError, WeftError, did_you_mean, reason
from weftlm.files import write_whole
from weftlm.pipeline.checks import check_recipe
from weftlm.pipeline.recipe import Recipe, kept_recipe
from weftlm.pipeline.stage_records import (
    Record,
    alone,
    at_work,
    digests,
    now,
    read_record,
    write_record,
)
from weftlm.pipeline.stages import Call, Stage, stages_of
from weftlm.progress import write_line

if TYPE_CHECKING:
    from accelerate import PartialState

State = Literal["done", "running", "interrupted", "failed", "stale", "to do"]
Act = Literal["skip", "run", "continue", "replace", "refuse"]


@dataclass(frozen=True)
class StageStatus:
    """Where a stage stands.

    Attributes:
        stage: the stage.
        state: done, running, interrupted, failed, stale, or to do.
        why: what makes it stale, or the message of a failure; empty otherwise.
        seconds: it took, where it is done.
        ended: when, UTC.
        settled: whether its settings and what it reads are as they were, so that nothing of it need be discarded; False
            too where that was asked for and is still to come.
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
    """Where every stage of a project stands; reads nothing but the run folder and the state of the inputs.

    Raises:
        DataError: a record is torn, or an input is not there.
    """
    busy = at_work(recipe.run)
    found: dict[str, StageStatus] = {}
    for stage in stages_of(recipe):
        found[stage.name] = _status(recipe, stage, found, busy)
    return list(found.values())


def _status(recipe: Recipe, stage: Stage, earlier: Mapping[str, StageStatus], busy: bool) -> StageStatus:
    record = read_record(recipe.stages_folder, stage.name)
    if record is None:
        return StageStatus(stage, "to do")
    if record.state == "due":
        return StageStatus(stage, "to do", settled=False)
    why = differences(record.settings, stage.settings(recipe), most=3)
    if why:
        return StageStatus(stage, "stale", why, record.seconds, record.ended, settled=False)
    for name in stage.needs:
        before = read_record(recipe.stages_folder, name)
        if before is not None and before.state == "done" and record.needs.get(name) != before.digest:
            why = f"{name} was made anew"
            return StageStatus(stage, "stale", why, record.seconds, record.ended, settled=False)
    if record.state == "begun":
        return StageStatus(stage, "running" if busy else "interrupted")
    if record.state == "failed":
        return StageStatus(stage, "failed", record.message, record.seconds, record.ended)
    why = _moved(recipe, stage, record, earlier)
    return StageStatus(stage, "stale" if why else "done", why, record.seconds, record.ended)


def _moved(recipe: Recipe, stage: Stage, record: Record, earlier: Mapping[str, StageStatus]) -> str:
    """Why a finished stage does not stand though what decides it does; empty where it stands."""
    for path in stage.outputs(recipe):
        if not path.exists():
            return f"{path} is gone"
    # In order and not by path: a run folder may go by several names. What no record knows need only be there.
    for (place, digest), known in zip(digests(stage.outputs(recipe)).items(), record.outputs.values(), strict=False):
        if digest != known:
            return f"{place} has changed since"
    for name in stage.needs:
        if name in earlier and earlier[name].state != "done":
            return f"{name} is {earlier[name].state}"
    return ""


def plan_stages(
    recipe: Recipe, *, from_stage: str | None = None, until: str | None = None
) -> list[tuple[StageStatus, Act]]:
    """What `run_project` would do with each stage, as far as can be said beforehand.

    Raises:
        ConfigError: no such stage, `from_stage` comes after `until`, or a stage before `from_stage` is not done.
    """
    found = project_status(recipe)
    if any(status.stage.name == "experts" and status.state != "done" for status in found):
        from weftlm.pipeline.experts import check_experts  # noqa: PLC0415 - torch

        check_experts(recipe, None if not recipe.trains else recipe.model)
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
    return [(status, _act(status, anew=place >= first)) for place, status in enumerate(found[:last])]


def _act(status: StageStatus, *, anew: bool) -> Act:
    if status.state == "to do":
        return "run" if status.settled else "replace"
    if anew:
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
        recipe: from a recipe.
        from_stage: make this stage and all later ones anew; those before it must be done.
        until: stop after this stage.
        processes: experts made at once.
        progress: a line per stage on stderr, and what the stages themselves show.
    Returns:
        where every stage stands afterwards.
    Raises:
        ConfigError: as `plan_stages`; or a costly stage is stale, and nobody asked for it to be replaced.
        CheckpointError: another process is at work in the run folder.
        WeftError: a stage failed; what it and those before it finished stays, and the next run continues.
    """
    check_recipe(recipe, ask=True, here=False)
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
                status.stage.settings(recipe)  # what it reads from outside is missed now, not after hours
        together()
        if first:
            recipe.stages_folder.mkdir(exist_ok=True)
            write_whole(kept_recipe(recipe.run), recipe.to_yaml())
            for status, act in planned if from_stage is not None else ():
                if act == "replace":  # which goes on without --from where this run is cut short
                    due = Record(stage=status.stage.name, state="due", settings=None, needs={}, began=now())
                    write_record(recipe.stages_folder, due)
        known: dict[str, StageStatus] = {}
        for number, (status, act) in enumerate(planned):
            if from_stage is None or act != "replace":
                status = _status(recipe, status.stage, known, busy=False)
                act = _act(status, anew=False)
                _refuse(status, act)
            if act == "replace" and first:
                status.stage.clear(recipe)
            together()
            place = f"stage {number + 1} of {len(planned)}, {status.stage.name}"
            _tell(f"{place}: {'done already' if act == 'skip' else status.stage.title}", progress and first)
            if act != "skip" and (first or status.stage.shared):
                replace = _replaces(recipe, status.stage, act)
                call = Call(replace=replace, processes=processes, progress=progress and first)
                _carry_out(recipe, status.stage, call, keep=first)
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
            f"the stage {name} was made of something else ({status.why}); make it and what follows anew with weftlm "
            f"run --from {name}, which discards what is there, or choose another run folder"
        )


def _replaces(recipe: Recipe, stage: Stage, act: Act) -> bool:
    """Whether a stage discards what is there of other settings: made anew, or going on with what was to be that."""
    if act != "continue":
        return act == "replace"
    record = read_record(recipe.stages_folder, stage.name)
    return record is not None and record.replace


def _carry_out(recipe: Recipe, stage: Stage, call: Call, *, keep: bool) -> None:
    """Run one stage and keep its record."""
    folder, start, began = recipe.stages_folder, time.perf_counter(), now()
    settings = stage.settings(recipe)
    records = {name: read_record(folder, name) for name in stage.needs}
    needs = {name: record.digest for name, record in records.items() if record is not None}

    def write(state: Literal["begun", "done", "failed"], **facts: Any) -> None:
        if keep:
            about = {"settings": settings, "needs": needs, "began": began, "replace": call.replace}
            write_record(folder, Record(stage=stage.name, state=state, **about, **facts))

    write("begun")
    if call.replace:
        interrupt.done_with("--from")
    try:
        stage.work(recipe, call)
        outputs = digests(stage.outputs(recipe)) if keep else {}
    except (WeftError, OSError) as error:
        write("failed", ended=now(), seconds=time.perf_counter() - start, message=reason(error))
        raise
    write("done", ended=now(), seconds=time.perf_counter() - start, outputs=outputs)


def _tell(text: str, shown: bool) -> None:
    if shown:
        write_line(text)

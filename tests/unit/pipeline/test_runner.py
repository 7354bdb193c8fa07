"""Stages are skipped, continued, made again or refused by what they were made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.faults import held_by_another
from support.tiny_project import recipe_value, write_corpora

from weftlm.errors import CheckpointError, ConfigError, DataError
from weftlm.files import write_object
from weftlm.pipeline import runner
from weftlm.pipeline.recipe import Recipe, make_recipe
from weftlm.pipeline.run_folder import LOCK
from weftlm.pipeline.runner import StageStatus, plan_stages, project_status, run_project
from weftlm.pipeline.stage import Stage, StageOptions, stages_of


@dataclass
class Script:
    """What the stages below do: text -> (costly) model -> gate -> page, each writing its setting into a file."""

    settings: dict[str, Any] = field(default_factory=lambda: {"text": 1, "model": 1, "gate": 1, "page": 1})
    worked: list[tuple[str, bool]] = field(default_factory=list)
    fails: tuple[str, BaseException] | None = None

    def stages(self, project: Recipe) -> tuple[Stage, ...]:
        names = list(self.settings)
        return tuple(Writes(self, name, *names[max(0, place - 1) : place]) for place, name in enumerate(names))

    def run(self, project: Recipe, **options: Any) -> list[tuple[str, bool]]:
        """Carry the project through; the stages that worked, and whether they were to replace what was there."""
        self.worked = []
        run_project(project, progress=False, **options)
        return self.worked


class Killed(BaseException):
    pass


class Writes(Stage):
    title = "writes a file"

    def __init__(self, script: Script, name: str, *needs: str) -> None:
        super().__init__(name)
        self.script, self.needs = script, needs  # type: ignore[misc]
        self.costly = name in ("text", "model")  # type: ignore[misc]

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return {"value": self.script.settings[self.name], "path": "x"}

    def outputs(self, recipe: Recipe) -> list[Path]:
        return [recipe.run / f"{self.name}.txt"]

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        self.script.worked.append((self.name, options.replace))
        if self.script.fails is not None and self.script.fails[0] == self.name:
            raise self.script.fails[1]
        (path,) = self.outputs(recipe)
        if self.costly and path.exists() and not options.replace:
            raise CheckpointError("holds another model")
        path.write_text(f"{self.script.settings[self.name]}")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    found = Script()
    monkeypatch.setattr(runner, "stages_of", found.stages)
    return found


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path / "corpora")
    return make_recipe({**recipe_value(), "run": str(tmp_path / "run")})


@pytest.fixture
def done(script: Script, project: Recipe) -> Recipe:
    script.run(project)
    return project


def states(project: Recipe) -> dict[str, str]:
    return {status.stage.name: status.state for status in project_status(project)}


def status(project: Recipe, name: str) -> StageStatus:
    return next(each for each in project_status(project) if each.stage.name == name)


def test_a_second_run_does_nothing(script: Script, project: Recipe) -> None:
    assert set(states(project).values()) == {"to do"}
    assert script.run(project) == [("text", False), ("model", False), ("gate", False), ("page", False)]
    assert set(states(project).values()) == {"done"}
    assert script.run(project) == []


def test_a_change_reaches_what_depends_on_it(script: Script, done: Recipe) -> None:
    script.settings["gate"] = 2
    assert states(done) == {"text": "done", "model": "done", "gate": "stale", "page": "stale"}
    assert status(done, "gate").why == "value: 1 before, 2 now"
    assert status(done, "page").why == "gate is stale"
    assert script.run(done) == [("gate", True), ("page", True)]


def test_a_costly_stage_is_replaced_only_when_that_is_asked_for(script: Script, done: Recipe) -> None:
    script.settings["model"] = 2
    assert [act for _, act in plan_stages(done)] == ["skip", "refuse", "replace", "replace"]
    with pytest.raises(ConfigError, match=r"stage model was made of something else \(value: 1 before, 2 now\).*--from"):
        script.run(done)
    assert script.worked == []
    assert (done.run / "model.txt").read_text() == "1"
    assert script.run(done, from_stage="model") == [("model", True), ("gate", True), ("page", True)]
    assert (done.run / "model.txt").read_text() == "2"


def test_a_run_may_stop_after_a_stage_and_begin_again_at_one(script: Script, project: Recipe) -> None:
    assert script.run(project, until="model") == [("text", False), ("model", False)]
    assert states(project) == {"text": "done", "model": "done", "gate": "to do", "page": "to do"}
    assert script.run(project) == [("gate", False), ("page", False)]
    assert script.run(project, from_stage="gate") == [("gate", True), ("page", True)]


@pytest.mark.parametrize(
    ("how", "state", "why"), [(DataError("model is torn"), "failed", "model is torn"), (Killed(), "interrupted", "")]
)
def test_work_cut_short_is_continued_without_discarding(
    script: Script, project: Recipe, how: BaseException, state: str, why: str
) -> None:
    script.fails = ("model", how)
    with pytest.raises(type(how)):
        script.run(project)
    script.fails = None
    assert (status(project, "model").state, status(project, "model").why) == (state, why)
    assert script.run(project) == [("model", False), ("gate", False), ("page", False)]


def test_going_on_with_a_replacement_replaces_it_and_the_stages_after_it(script: Script, done: Recipe) -> None:
    """A stage that keeps its own results apart, as data and experts are, must know again what it may discard."""
    script.settings["text"], script.fails = 2, ("text", DataError("text is torn"))
    with pytest.raises(DataError):
        script.run(done, from_stage="text")
    script.fails = None
    assert states(done) == {"text": "failed", "model": "to do", "gate": "to do", "page": "to do"}
    assert script.run(done) == [("text", True), ("model", True), ("gate", True), ("page", True)]
    assert script.run(done) == []


def test_what_is_discarded_is_first_no_longer_done(project: Recipe, tmp_path: Path) -> None:
    """Killed while it removes a finished stage, a pipeline must not find that stage done."""
    seen: list[bool] = []
    result, weights = project.run / "result.json", project.run / "model"
    weights.mkdir(parents=True)
    result.write_text("{}")

    class Watched(type(weights)):  # type: ignore[misc]
        def is_dir(self, **how: Any) -> bool:
            seen.append(result.exists())
            return bool(super().is_dir(**how))

    class Two(Writes):
        def outputs(self, recipe: Recipe) -> list[Path]:
            return [result]

        def discarded(self, recipe: Recipe) -> list[Path]:
            return [Watched(weights), result]

    stage = Two(Script(), "model")
    stage.clear(project)
    assert seen
    assert not any(seen)
    assert not weights.exists()


def test_interrupted_work_over_something_new_is_stale(script: Script, project: Recipe) -> None:
    script.fails = ("model", DataError("model is torn"))
    with pytest.raises(DataError):
        script.run(project)
    script.fails = None
    script.settings["text"] = 2
    script.run(project, from_stage="text", until="text")
    model = status(project, "model")
    assert (model.state, model.why, model.settled) == ("stale", "text was replaced", False)
    with pytest.raises(ConfigError, match=r"text was replaced.*--from model"):
        script.run(project)
    script.run(project, from_stage="model")
    assert set(states(project).values()) == {"done"}


def test_what_was_removed_or_changed_is_made_again(script: Script, done: Recipe) -> None:
    (done.run / "gate.txt").unlink()
    assert "gate.txt is gone" in status(done, "gate").why
    assert script.run(done) == [("gate", True)]
    (done.run / "gate.txt").write_text("by hand")
    assert "gate.txt has 7 bytes, 1 when it was written" in status(done, "gate").why
    assert script.run(done) == [("gate", True)]
    (done.run / "model.txt").unlink()
    assert script.run(done) == [("model", False)], "a costly stage goes on from what is left"


def test_a_run_folder_may_go_by_another_name(script: Script, done: Recipe, tmp_path: Path) -> None:
    done.run.rename(tmp_path / "moved")
    moved = make_recipe({**recipe_value(), "run": str(tmp_path / "moved")})
    assert script.run(moved) == []
    (moved.run / "gate.txt").write_text("by hand")
    assert states(moved)["gate"] == "stale"


def test_outputs_outside_a_run_folder_behind_a_link_are_found(
    script: Script, project: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Outside(Writes):
        def outputs(self, recipe: Recipe) -> list[Path]:
            return [Path("shared.txt")]

    Path("deep/er").mkdir(parents=True)
    Path("runs").symlink_to(Path("deep/er").absolute())
    monkeypatch.setattr(runner, "stages_of", lambda project: (Outside(script, "text"),))
    assert script.run(make_recipe({**recipe_value(), "run": "runs/one"})) == [("text", False)]
    Path("deep/er/one").rename("moved")
    assert script.run(make_recipe({**recipe_value(), "run": "moved"})) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"from_stage": "gat"}, r"--from gat: this project has no such stage; did you mean 'gate'"),
        ({"until": "x"}, r"--until x: this project has no such stage"),
        ({"from_stage": "gate", "until": "text"}, "comes after --until text"),
        ({"from_stage": "gate"}, r"the stage text before it is not done \(to do\)"),
    ],
)
def test_unknown_and_impossible_ranges_are_refused(
    script: Script, project: Recipe, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_stages(project, **options)


def test_two_pipelines_do_not_share_a_folder(script: Script, done: Recipe) -> None:
    with (
        held_by_another(done.run / LOCK) as process,
        pytest.raises(CheckpointError, match=rf"another process \({process} .*is at work in"),
    ):
        script.run(done)


def test_records_that_are_torn_are_named_and_those_of_an_earlier_version_stale(script: Script, done: Recipe) -> None:
    record = done.stages_folder / "text.json"
    write_object(record, {"stage": "text", "state": "done", "settings": {"value": 1}, "needs": {}, "outputs": {}})
    text = status(done, "text")
    assert (text.state, text.settled) == ("stale", False)
    assert "value: absent before" in text.why
    record.write_text("{")
    with pytest.raises(DataError, match=r"text\.json cannot be read"):
        project_status(done)


def test_a_project_has_the_stages_of_its_sections(tmp_path: Path) -> None:
    value = {**recipe_value(), "run": str(tmp_path)}
    assert [stage.name for stage in stages_of(make_recipe(value))] == ["prepare", "train", "evaluate", "report"]
    whole = stages_of(make_recipe({**value, **WHOLE}))
    assert [stage.name for stage in whole] == [
        "prepare", "train", "baselines", "experts", "route", "score", "gate", "distil", "evaluate", "report",
    ]  # fmt: skip
    for section, waits in (({}, False), ({"baseline": "uniform"}, True)):
        recipe = make_recipe({**value, **WHOLE, "experts": section})
        assert ("baselines" in whole[3].needed(recipe)) == waits
    with pytest.raises(ConfigError, match=r"experts\.baseline is 'doge', which .* does not train; it names uniform"):
        make_recipe({**value, **WHOLE, "experts": {"baseline": "doge"}})
    small = {"run": str(tmp_path), "data": value["data"], "experts": {"base": "some/base"}}
    assert [stage.name for stage in stages_of(make_recipe(small))] == ["prepare", "experts", "evaluate", "report"]


WHOLE = {"experts": {}, "routing": {}, "gating": {}, "compare": {"mixtures": ["uniform"]}}
POOL = {
    "run": "runs/pool",
    "data": recipe_value()["data"],
    "gating": {"pool": [{"name": "a", "model": "some/a"}, {"name": "b", "model": "some/b"}]},
}


def decided(value: dict[str, Any]) -> dict[str, Any]:
    """The settings of every stage but the first, which looks at files."""
    project = make_recipe(value)
    return {stage.name: stage.settings(project) for stage in stages_of(project) if stage.name != "prepare"}


@pytest.mark.parametrize(
    ("before", "change", "reached"),
    [
        (WHOLE, {"evaluation": {"every_steps": 7}}, set()),
        (WHOLE, {"evaluation": {"batch_size": 3, "every_steps": 30}}, {"route", "score", "evaluate"}),
        (WHOLE, {"evaluation": {"max_tokens_per_set": 99, "every_steps": 30}}, {"route", "evaluate"}),
        (WHOLE, {"routing": None}, {"evaluate", "report"}),
        (WHOLE, {"routing": None, "gating": None}, {"evaluate", "report"}),
        (WHOLE, {"compare": None}, {"evaluate", "report"}),
        (POOL, {"experts": {"dtype": "bfloat16"}}, {"score", "evaluate"}),
        (POOL, {"experts": {"training": {"sequence_length": 64}}}, {"score", "evaluate"}),
    ],
)
def test_a_change_reaches_the_stages_it_decides_and_no_other(
    before: dict[str, Any], change: dict[str, Any], reached: set[str]
) -> None:
    one = {**(POOL if before is POOL else recipe_value()), **before}
    other = {key: value for key, value in {**one, **change}.items() if value is not None}
    first, second = decided(one), decided(other)
    assert {name for name in second if first[name] != second[name]} == reached

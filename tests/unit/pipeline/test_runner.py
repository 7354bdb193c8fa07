"""Stages are skipped, continued, made anew or refused by what they were made of."""

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
from weftlm.pipeline.run_folder import LOCK, at_work
from weftlm.pipeline.runner import plan_stages, project_status, run_project
from weftlm.pipeline.stage import Stage, StageOptions, every_stage, read_stage, stages_of

OVER = {"baseline": "uniform"}


@dataclass
class Script:
    """What the stages below do: text -> (costly) model -> gate -> page, each writing what it reads."""

    settings: dict[str, Any] = field(default_factory=lambda: {"text": 1, "model": 1, "gate": 1, "page": 1})
    worked: list[tuple[str, bool]] = field(default_factory=list)
    fails: str | None = None
    killed: str | None = None

    def stages(self, project: Recipe) -> tuple[Stage, ...]:
        return (
            Writes(self, "text"),
            Writes(self, "model", "text"),
            Writes(self, "gate", "model"),
            Writes(self, "page", "gate"),
        )

    def take(self) -> list[tuple[str, bool]]:
        taken, self.worked = self.worked, []
        return taken


class Killed(BaseException):
    pass


class Writes(Stage):
    """A stage that writes its setting into a file."""

    title = "writes a file"

    def __init__(self, script: Script, name: str, *needs: str) -> None:
        super().__init__(name)
        self.script, self.needs = script, needs  # type: ignore[misc]
        self.costly = name in ("text", "model")  # type: ignore[misc]

    def wanted(self, recipe: Recipe) -> bool:
        return True

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return {"value": self.script.settings[self.name], "path": "x"}

    def outputs(self, recipe: Recipe) -> list[Path]:
        return [recipe.run / f"{self.name}.txt"]

    def discarded(self, recipe: Recipe) -> list[Path]:
        return self.outputs(recipe)

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        script, name = self.script, self.name
        script.worked.append((name, options.replace))
        if script.fails == name:
            raise DataError(f"{name} is torn")
        if script.killed == name:
            raise Killed
        path = recipe.run / f"{name}.txt"
        if path.exists() and name == "model" and path.read_text() != f"{script.settings[name]}":
            raise CheckpointError("holds another model")
        path.write_text(f"{script.settings[name]}")


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


def states(project: Recipe) -> dict[str, str]:
    return {status.stage.name: status.state for status in project_status(project)}


def test_a_second_run_does_nothing(script: Script, project: Recipe) -> None:
    assert set(states(project).values()) == {"to do"}
    assert {status.state for status in run_project(project, progress=False)} == {"done"}
    assert script.take() == [("text", False), ("model", False), ("gate", False), ("page", False)]
    run_project(project, progress=False)
    assert script.take() == []


def test_a_change_reaches_what_depends_on_it(script: Script, project: Recipe) -> None:
    run_project(project, progress=False)
    script.take()
    script.settings["gate"] = 2
    found = {status.stage.name: status for status in project_status(project)}
    assert {name: status.state for name, status in found.items()} == {
        "text": "done", "model": "done", "gate": "stale", "page": "stale",
    }  # fmt: skip
    assert found["gate"].why == "value: 1 before, 2 now"
    assert found["page"].why == "gate is stale"
    run_project(project, progress=False)
    assert script.take() == [("gate", True), ("page", True)]


def test_a_costly_stage_is_replaced_only_when_that_is_asked_for(script: Script, project: Recipe) -> None:
    run_project(project, progress=False)
    script.take()
    script.settings["model"] = 2
    assert [act for _, act in plan_stages(project)] == ["skip", "refuse", "replace", "replace"]
    with pytest.raises(ConfigError, match=r"stage model was made of something else \(value: 1 before, 2 now\).*--from"):
        run_project(project, progress=False)
    assert script.take() == []
    assert (project.run / "model.txt").read_text() == "1"
    run_project(project, from_stage="model", progress=False)
    assert script.take() == [("model", True), ("gate", True), ("page", True)]
    assert (project.run / "model.txt").read_text() == "2"


def test_a_costly_stage_over_a_new_one_is_not_replaced_either(script: Script, project: Recipe) -> None:
    run_project(project, progress=False)
    script.settings["text"] = 2
    run_project(project, from_stage="text", until="text", progress=False)
    found = {status.stage.name: status for status in project_status(project)}
    assert found["model"].why == "text was replaced"
    with pytest.raises(ConfigError, match="text was replaced"):
        run_project(project, progress=False)


def test_from_makes_anew_even_what_is_unchanged(script: Script, project: Recipe) -> None:
    run_project(project, progress=False)
    script.take()
    run_project(project, from_stage="gate", progress=False)
    assert script.take() == [("gate", True), ("page", True)]


def test_until_stops_and_the_next_run_goes_on(script: Script, project: Recipe) -> None:
    run_project(project, until="model", progress=False)
    assert states(project) == {"text": "done", "model": "done", "gate": "to do", "page": "to do"}
    script.take()
    run_project(project, progress=False)
    assert script.take() == [("gate", False), ("page", False)]


def test_a_failure_is_kept_and_continued(script: Script, project: Recipe) -> None:
    script.fails = "gate"
    with pytest.raises(DataError, match="gate is torn"):
        run_project(project, progress=False)
    failed = project_status(project)[2]
    assert (failed.state, failed.why) == ("failed", "gate is torn")
    script.fails = None
    script.take()
    run_project(project, progress=False)
    assert script.take() == [("gate", False), ("page", False)]


def test_an_interrupted_stage_is_continued_without_discarding(script: Script, project: Recipe) -> None:
    script.killed = "model"
    with pytest.raises(Killed):
        run_project(project, progress=False)
    script.killed = None
    assert states(project)["model"] == "interrupted"
    script.take()
    run_project(project, progress=False)
    assert script.take()[0] == ("model", False)


def test_going_on_with_a_replacement_still_replaces(script: Script, project: Recipe) -> None:
    """A stage that keeps its own results apart, as data and experts are, must be told again what it may discard."""
    run_project(project, progress=False)
    script.settings["model"], script.fails = 2, "model"
    with pytest.raises(DataError):
        run_project(project, from_stage="model", progress=False)
    script.take()
    script.fails = None
    run_project(project, until="model", progress=False)
    assert script.take() == [("model", True)]
    read = read_stage(project, "model")
    assert read is not None
    assert read[1]["replace"]


def test_going_on_with_a_replacement_replaces_the_costly_stages_after_it_too(script: Script, project: Recipe) -> None:
    run_project(project, progress=False)
    script.settings["text"], script.fails = 2, "text"
    with pytest.raises(DataError):
        run_project(project, from_stage="text", progress=False)
    script.take()
    script.fails = None
    assert states(project) == {"text": "failed", "model": "to do", "gate": "to do", "page": "to do"}
    run_project(project, progress=False)
    assert script.take() == [("text", True), ("model", True), ("gate", True), ("page", True)]
    run_project(project, progress=False)
    assert script.take() == []


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
    script.fails = "model"
    with pytest.raises(DataError):
        run_project(project, progress=False)
    script.fails = None
    script.settings["text"] = 2
    run_project(project, from_stage="text", until="text", progress=False)
    model = project_status(project)[1]
    assert (model.state, model.why, model.settled) == ("stale", "text was replaced", False)
    with pytest.raises(ConfigError, match=r"text was replaced.*--from model"):
        run_project(project, progress=False)
    run_project(project, from_stage="model", progress=False)
    assert set(states(project).values()) == {"done"}


def test_what_was_removed_or_changed_is_made_again(script: Script, project: Recipe) -> None:
    run_project(project, progress=False)
    script.take()
    (project.run / "gate.txt").unlink()
    assert "gate.txt is gone" in project_status(project)[2].why
    run_project(project, progress=False)
    assert script.take() == [("gate", True)]
    (project.run / "gate.txt").write_text("by hand")
    assert "gate.txt has 7 bytes, 1 when it was written" in project_status(project)[2].why
    run_project(project, progress=False)
    assert script.take() == [("gate", True)]
    (project.run / "model.txt").unlink()
    run_project(project, progress=False)
    assert script.take() == [("model", False)], "a costly stage goes on from what is left"


def test_a_run_folder_may_go_by_another_name(script: Script, project: Recipe, tmp_path: Path) -> None:
    run_project(project, progress=False)
    script.take()
    project.run.rename(tmp_path / "moved")
    moved = make_recipe({**recipe_value(), "run": str(tmp_path / "moved")})
    assert set(states(moved).values()) == {"done"}
    run_project(moved, progress=False)
    assert script.take() == []
    (moved.run / "gate.txt").write_text("by hand")
    assert states(moved)["gate"] == "stale"


def test_outputs_outside_a_run_folder_behind_a_link_are_found(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Outside(Writes):
        def outputs(self, recipe: Recipe) -> list[Path]:
            return [Path("shared.txt")]

        def work(self, recipe: Recipe, options: StageOptions) -> None:
            self.script.worked.append((self.name, options.replace))
            Path("shared.txt").write_text("1")

    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path / "corpora")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "deep" / "er")
    monkeypatch.setattr(runner, "stages_of", lambda project: (Outside(script, "text"),))
    project = make_recipe({**recipe_value(), "run": "runs/one"})
    run_project(project, progress=False)
    Path("deep/er/one").rename("moved")
    run_project(make_recipe({**recipe_value(), "run": "moved"}), progress=False)
    assert script.take() == [("text", False)]


def test_unknown_and_impossible_ranges_are_refused(script: Script, project: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"--from gat: this project has no such stage; did you mean 'gate'"):
        plan_stages(project, from_stage="gat")
    with pytest.raises(ConfigError, match=r"--until x: this project has no such stage"):
        plan_stages(project, until="x")
    with pytest.raises(ConfigError, match="comes after --until text"):
        plan_stages(project, from_stage="gate", until="text")
    with pytest.raises(ConfigError, match=r"the stage text before it is not done \(to do\)"):
        plan_stages(project, from_stage="gate")


def test_two_pipelines_do_not_share_a_folder(script: Script, project: Recipe) -> None:
    run_project(project, until="text", progress=False)
    assert not at_work(project.run)
    with held_by_another(project.run / LOCK) as process:
        assert at_work(project.run)
        with pytest.raises(CheckpointError, match=rf"another process \({process} .*is at work in"):
            run_project(project, progress=False)


def test_what_a_late_stage_reads_is_missed_before_the_first_begins(project: Recipe, tmp_path: Path) -> None:
    asking = {**recipe_value(), "run": str(tmp_path / "run"), "evaluation": {"tasks": [{"path": "nowhere/*.jsonl"}]}}
    with pytest.raises(DataError, match=r"evaluation\.tasks: .*'nowhere/\*\.jsonl' matches no file"):
        run_project(make_recipe(asking), progress=False)
    assert set(states(project).values()) == {"to do"}


def test_a_torn_record_is_named(script: Script, project: Recipe) -> None:
    run_project(project, until="text", progress=False)
    (project.stages_folder / "text.json").write_text("{")
    with pytest.raises(DataError, match=r"text\.json cannot be read"):
        project_status(project)


def test_records_of_an_earlier_version_are_stale(script: Script, project: Recipe) -> None:
    run_project(project, progress=False)
    old = {"stage": "text", "state": "done", "settings": {"value": 1}, "needs": {}, "outputs": {}}
    write_object(project.stages_folder / "text.json", old)
    found = project_status(project)
    assert (found[0].state, found[0].settled) == ("stale", False)
    assert "value: absent before" in found[0].why


def test_every_stage_comes_after_those_that_it_needs() -> None:
    assert [stage.name for stage in every_stage()] == [
        "prepare", "train", "baselines", "experts", "route", "score", "gate", "distil", "evaluate", "report",
    ]  # fmt: skip


def test_a_project_has_the_stages_of_its_sections(tmp_path: Path) -> None:
    value = {**recipe_value(), "run": str(tmp_path)}
    assert [stage.name for stage in stages_of(make_recipe(value))] == ["prepare", "train", "evaluate", "report"]
    experts = {"experts": {}, "routing": {}, "gating": {}, "compare": {"mixtures": ["uniform"]}}
    whole = stages_of(make_recipe({**value, **experts}))
    assert [stage.name for stage in whole] == [stage.name for stage in every_stage()]
    both = [make_recipe({**value, **experts, "experts": section}) for section in ({}, OVER)]
    plain, over = ({stage.name: stage.needed(each) for stage in stages_of(each)} for each in both)
    assert "baselines" not in plain["experts"]
    assert "baselines" in over["experts"]
    with pytest.raises(ConfigError, match=r"experts\.baseline is 'doge', which .* does not train; it names uniform"):
        make_recipe({**value, **experts, "experts": {"baseline": "doge"}})
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

"""`weftlm report`: a project's page is never replaced by a smaller one."""

from __future__ import annotations

import json

import pytest

from weftlm.cli.main import main
from weftlm.files import write_object
from weftlm.pipeline.project_report import report_project
from weftlm.pipeline.recipe import make_recipe
from weftlm.pipeline.stage import stages

WHOLE = "the whole project"


@pytest.fixture
def call(capsys):
    def run(*words, code=0):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words)])
        assert (ended.value.code or 0) == code
        printed = capsys.readouterr()
        return (printed.err if code else printed.out).strip()

    return run


@pytest.fixture
def project(tmp_path):
    """A finished project of experts over a base that was there before, and a plain run beside it."""
    run = tmp_path / "project"
    made = make_recipe({"run": str(run), "data": {"corpora": [{"path": "a", "label": "a"}]}, "experts": {"base": "b"}})
    sets = {"a": {"bits_per_byte": 1.0, "bits_per_byte_se": 0.1}}
    model = {"path": "m", "kind": "plain", "role": "base", "sets": sets}
    (run / "stages").mkdir(parents=True)
    (run / "stages" / "recipe.yaml").write_text(made.to_yaml())
    write_object(
        run / "evaluation.json", {"sequence_length": 8, "base": "base", "models": {"base": model}, "monolith": None}
    )
    report_project(made)
    stage = stages["report"]("report")
    stage.record(made).finish({"needs": {}, "seconds": 0.0}, stage.left(made))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "metrics.jsonl").touch()
    return made


def test_the_page_of_a_project_is_renewed_whole_and_its_record_with_it(project, call):
    page = project.run / "report.html"
    page.unlink()
    assert call("report", project.run) == f"report: {page}"
    assert stages["report"]("report").record(project).reuse() is not None  # its files are those that it lists
    call("report", project.run, "--title", "Ours")
    assert all(each in page.read_text() for each in ("Every model", "Ours"))


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["project", "plain"], "project/compared.html"),
        (["plain", "project"], "plain/compared.html"),
        (["plain"], "plain/report.html"),
        (["project", "--output", "other.html"], "other.html"),
    ],
)
def test_other_pages_go_elsewhere(words, written, project, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    before = (project.run / "report.html").read_text()
    assert json.loads(call("report", *words, "--json"))["report"] == written
    assert (tmp_path / written).exists()
    assert WHOLE in before == (project.run / "report.html").read_text()
    assert (WHOLE in (tmp_path / written).read_text()) == (words == ["project", "--output", "other.html"])


def test_a_project_that_is_not_measured_keeps_the_page_it_has(project, call):
    (project.run / "evaluation.json").unlink()
    assert call("report", project.run) == f"report: {project.run / 'training.html'}"
    assert WHOLE in (project.run / "report.html").read_text()


def test_figures_of_an_earlier_version_are_named_with_the_command_that_makes_them_again(project, call):
    found = json.loads((project.run / "evaluation.json").read_text())
    del found["checksum"], found["models"]["base"]["role"]
    write_object(project.run / "evaluation.json", found)
    said = call("report", project.run, code=1)
    assert "evaluation.json was written by another version of weftlm" in said
    assert "weftlm run --from evaluate" in said


def test_no_page_is_written_over_a_projects_when_it_is_named(project, tmp_path, call):
    page = project.run / "report.html"
    for words in ([tmp_path / "plain", "-o", page], [project.run, tmp_path / "plain", "-o", page]):
        assert "is the page of a whole project" in call("report", *words, code=2)
    (tmp_path / "routed").mkdir()
    (tmp_path / "routed" / "routed.json").touch()
    assert "is the page of a whole project" in call(
        "route", "trace", tmp_path / "routed", "text", "--html", page, code=2
    )


@pytest.mark.parametrize("command", ["status", "report"])
def test_a_torn_recipe_of_a_run_folder_is_named(project, call, command):
    recipe = project.run / "stages" / "recipe.yaml"
    recipe.write_text("data:\ntraining:\n  decay_fraction:\n")
    assert f"{recipe} cannot be read: " in call(command, project.run, code=2)

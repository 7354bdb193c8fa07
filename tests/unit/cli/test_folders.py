"""A command given a folder of another kind: one line that says what it is, and a command that takes it."""

from __future__ import annotations

import re
import shlex

import pytest
import typer

from weftlm.cli.main import commands, main
from weftlm.errors import ConfigError
from weftlm.pipeline.recipe import make_recipe

DATA = {"corpora": [{"path": "a", "label": "a"}]}
PROJECT = {"run": "project", "data": DATA, "experts": {"base": "b"}}
RUN = {
    "run": "run", "data": DATA, "model": {"architecture": "llama"}, "mixture": {"policy": "uniform"},
    "training": {"steps": 2},
}  # fmt: skip
FOLDERS = {
    "library": ["library.json"],
    "project": ["stages/recipe.yaml"],
    "run": ["recipe.yaml", "run.json"],
    "trained": ["recipe.yaml", "run.json", "model/config.json"],
    "data": ["prepared.json"],
    "scores": ["index.json"],
    "gate": ["fit.json"],
    "routed": ["routed.json"],
    "gated": ["modular.json"],
    "adapter": ["adapter_config.json"],
    "plain": ["config.json"],
    "empty": [],
    "other": ["notes.txt"],
    "a file": None,
}
MODELS = {"routed", "gated", "adapter", "plain", "trained"}
COMMANDS = {
    "serve": MODELS,
    "train": set(),
    "gate fit": set(),
    "export --output new": MODELS | {"library"},
    "status": {"project"},
    "report": {"project", "run", "trained"},
    "experts show": {"library"},
    "experts import": {"library", "empty", "other"},
    "route trace": {"routed"},
}
"""Command -> folders it takes."""


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, files in FOLDERS.items():
        if files is None:
            (tmp_path / name).write_text("run: x")
            continue
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                make_recipe(RUN if name in ("run", "trained") else PROJECT).to_yaml()
                if path.suffix == ".yaml"
                else "{}"
            )


def opened(words):
    """Parse a command line, arguments checked, and do nothing."""
    group, rest = commands(), words[1:]
    context = typer.Context(group, info_name="weftlm")
    while hasattr(group, "list_commands"):
        group, name, rest = group.get_command(context, rest[0]), rest[0], rest[1:]
        context = typer.Context(group, parent=context, info_name=name)
    group.make_context(name, list(rest), parent=context.parent).close()


@pytest.mark.parametrize("command", COMMANDS)
def test_another_folder_is_named_with_a_command_that_takes_it(command, folders, capsys):
    for folder in FOLDERS:
        words = [*command.split(), folder, *(["more"] if command in ("experts import", "route trace") else [])]
        if folder in COMMANDS[command]:
            opened(["weftlm", *words])
            continue
        if command in ("train", "gate fit") and folder == "a file":
            continue  # it may be a recipe
        with pytest.raises(SystemExit) as ended:
            main(words)
        said = capsys.readouterr().err.strip()
        assert ended.value.code == 2, said
        assert said.count("\n") == 0
        assert f"weftlm: {folder} is " in said
        assert "weftlm takes" not in said
        hint = re.search(r"Try: (weftlm [^,]+)", said)
        assert (hint is None) == (folder in ("empty", "other", "a file")), said
        if hint is not None:
            opened([*shlex.split(hint[1]), *(["TEXT"] if "route trace" in hint[1] else [])])


@pytest.mark.parametrize("command", [name for name in COMMANDS if name.split()[0] in ("status", "report", "experts")])
def test_a_folder_that_is_not_there_is_a_wrong_call(command, folders):
    words = [*command.split(), "nowhere", *(["more"] if command == "experts import" else [])]
    if command == "experts import":  # a new library
        opened(["weftlm", *words])
        return
    with pytest.raises(ConfigError, match="there is no folder nowhere"):
        opened(["weftlm", *words])

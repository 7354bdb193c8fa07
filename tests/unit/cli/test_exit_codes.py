"""The exit code of every kind of end, whatever the command: 0, 1, 2, and 128 plus the signal that stopped it."""

from __future__ import annotations

import os
import signal
from importlib import import_module
from keyword import iskeyword

import pytest

from weftlm.cli.main import COMMANDS, main
from weftlm.errors import CheckpointError, ConfigError, DataError, ExpertError, NumericsError

LINES = {
    "run": ["r.yaml"], "status": ["r"], "plan": ["r.yaml"], "prepare": ["r.yaml"], "domains": ["r.yaml"],
    "train": ["r.yaml"], "eval": ["r.yaml"], "report": ["r"], "score": ["r.yaml"], "serve": ["m"], "demo": [],
    "export": ["m", "--output", "o"], "experts train": ["r.yaml"], "experts gate": ["r.yaml", "e"],
    "experts import": ["new", "p"], "experts list": ["l"], "experts show": ["l"],
    "experts merge": ["l", "a", "--as", "c"],
    "experts remove": ["l", "e"], "route build": ["l", "--to", "o"], "route eval": ["r.yaml"],
    "route trace": ["t", "text"], "gate fit": ["r.yaml"], "gate distil": ["r.yaml"], "gate certify": ["r.yaml"],
}  # fmt: skip
"""Every command with arguments that are right as a call."""
FAULTS = {
    "ConfigError": (lambda: _raise(ConfigError("wrong")), 2),
    "DataError": (lambda: _raise(DataError("torn")), 1),
    "CheckpointError": (lambda: _raise(CheckpointError("torn")), 1),
    "NumericsError": (lambda: _raise(NumericsError("infinite")), 1),
    "ExpertError": (lambda: _raise(ExpertError("of another base")), 1),
    "OSError": (lambda: _raise(OSError(28, "No space left on device", "f")), 1),
    "SIGINT": (lambda: os.kill(os.getpid(), signal.SIGINT), 130),
    "SIGTERM": (lambda: os.kill(os.getpid(), signal.SIGTERM), 143),
    "nothing": (lambda: None, 0),
}


def _raise(error):
    raise error


def code_of(*words):
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return ended.value.code or 0


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("r.yaml", "r/stages/recipe.yaml", "r/recipe.yaml", "m/config.json", "l/library.json", "t/routed.json"):
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_text("{}")


def test_every_command_is_here():
    groups = {name: getattr(import_module(f"weftlm.cli.{name}"), "COMMANDS", None) for name in COMMANDS}
    assert set(LINES) == {f"{name} {each}".strip() for name, table in groups.items() for each in table or [""]}


@pytest.mark.parametrize("command", LINES)
def test_a_fault_inside_a_command_gives_its_code(command, monkeypatch, capsys):
    words = command.split()
    module = import_module(f"weftlm.cli.{'.'.join(words)}{'_' if iskeyword(words[-1]) else ''}")
    for name, (fault, code) in FAULTS.items():
        signature = module.run

        def run(*_, fault=fault, **__):
            fault()

        run.__wrapped__, run.__doc__ = signature, signature.__doc__  # whose signature is read
        with monkeypatch.context() as patched:
            patched.setattr(module, "run", run)
            assert code_of(*words, *LINES[command]) == code, name
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", LINES)
def test_a_wrong_call_is_2_and_help_is_0(command, capsys):
    words = command.split()
    assert code_of(*words, "--help") == 0
    assert code_of(*words, *LINES[command], "--no-such-option") == 2
    if LINES[command]:
        assert code_of(*words) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["experts"], ["rout"], ["experts", "lst"], ["--nope"]])
def test_no_command_or_an_unknown_one_is_2(words):
    assert code_of(*words) == 2


RECIPES = [name for name, words in LINES.items() if words and words[0] == "r.yaml"]


@pytest.mark.parametrize("command", RECIPES)
@pytest.mark.parametrize("recipe", [None, "", "- a", "run: [", "{run: x, nonsense: 1}", "run: x\nrun: y"], ids=range(6))
def test_a_wrong_recipe_is_2(command, recipe, tmp_path, capsys):
    if recipe is None:
        (tmp_path / "r.yaml").unlink()
    else:
        (tmp_path / "r.yaml").write_text(recipe)
    assert code_of(*command.split(), *LINES[command]) == 2
    assert "Traceback" not in capsys.readouterr().err

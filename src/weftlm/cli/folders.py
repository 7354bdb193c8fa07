"""What a folder is, and which command works on it, before a command opens it: each reads markers and nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import typer

from weftlm.errors import ConfigError

Wanted = Literal["recipe", "library", "new library", "model", "export", "run", "project", "routed"]
"""What a command's argument is to be."""

MARKERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "library": ("an expert library", ("library.json",)),
    "routed": ("a routed model", ("routed.json",)),
    "gated": ("a gated model", ("modular.json",)),
    "project": ("the run folder of a project (weftlm run)", ("stages/recipe.yaml",)),
    "trained": ("the run folder of a finished training", ("model/config.json", "model/adapter_config.json")),
    "run": ("the run folder of a training", ("recipe.yaml", "run.json", "result.json", "metrics.jsonl")),
    "data": ("a folder of prepared data", ("prepared.json",)),
    "scores": ("a folder of scores (weftlm score)", ("index.json",)),
    "gate": ("the folder of a fitted gate", ("fit.json",)),
    "adapter": ("a LoRA adapter", ("adapter_config.json",)),
    "plain": ("a model", ("config.json",)),
}
"""Kind of a folder -> what it is called, and the files by one of which it is known; of two kinds the first counts."""

_MODELS = ("routed", "gated", "adapter", "plain", "trained")
TAKEN: dict[Wanted, tuple[str, ...]] = {
    "recipe": (),
    "library": ("library",),
    "new library": ("library",),
    "model": _MODELS,
    "export": ("library", *_MODELS),
    "run": ("project", "trained", "run"),
    "project": ("project",),
    "routed": ("routed",),
}
"""What each kind of argument takes."""


def kinds_of(folder: Path) -> list[str]:
    """What a folder is, the most telling first; empty where it is nothing of weftlm's."""
    return [kind for kind, (_, marks) in MARKERS.items() if any((folder / mark).exists() for mark in marks)]


def takes(wanted: Wanted) -> Callable[[typer.Context, Any], Any]:
    """A callback of a command's argument that refuses a folder of another kind, and says which command takes it."""

    def check(context: typer.Context, value: Any) -> Any:
        if not context.resilient_parsing:
            for path in value if isinstance(value, list) else [value]:
                if path is not None:
                    _refuse_another(Path(path), wanted, context.command_path)
        return value

    return check


def _refuse_another(path: Path, wanted: Wanted, command: str) -> None:
    """Refuse what is no folder for a command.

    Raises:
        ConfigError: it is another one; the message names a command that takes it.
    """
    if wanted == "run" and path.suffix in (".yaml", ".yml"):
        return
    if not path.is_dir():
        if path.exists() and wanted != "recipe":
            raise ConfigError(f"{path} is a file; {command} takes {_said(wanted)}")
        if wanted in ("library", "run", "project", "routed"):
            raise ConfigError(f"there is no folder {path}; {command} takes {_said(wanted)}")
        return  # a hub name, a recipe that is not there, or a library that is to be
    kinds = kinds_of(path)
    if any(kind in TAKEN[wanted] for kind in kinds) or (wanted == "new library" and not kinds):
        return
    if not kinds:
        held = "an empty folder" if not any(path.iterdir()) else "a folder of none of the kinds weftlm knows"
        raise ConfigError(f"{path} is {held}; {command} takes {_said(wanted)}")
    found = _command_for(path, kinds, wanted, command)
    raise ConfigError(f"{path} is {MARKERS[kinds[0]][0]}; {command} takes {_said(wanted)}. Try: {found}")


def _said(wanted: Wanted) -> str:
    return {
        "recipe": "a recipe, a file of YAML",
        "library": "an expert library",
        "new library": "an expert library",
        "model": "a model's folder or a hub name",
        "export": "an expert library, a model's folder or a hub name",
        "run": "run folders",
        "project": "the run folder of a project (weftlm run)",
        "routed": "a routed model (weftlm route build)",
    }[wanted]


def _command_for(path: Path, kinds: Sequence[str], wanted: Wanted, command: str) -> str:
    """A command that works on a folder, nearest to what was wanted."""
    if kinds[0] in ("data", "scores", "gate"):
        return _owner(path.resolve(), wanted, command)
    if wanted == "recipe":
        trains = command.rsplit(maxsplit=1)[-1] in ("train", "eval")
        for recipe in (path / "recipe.yaml", *(() if trains else (path / "stages/recipe.yaml",))):
            if recipe.exists():
                return f"{command} {_quoted(recipe)}"
    if wanted in ("model", "export") and "project" in kinds and (models := _models_in(path)):
        more = " --output FOLDER" if wanted == "export" else ""
        return f"{command} {_quoted(models[0])}{more}"
    if wanted in ("library", "new library") and (path / "experts/library.json").exists():
        return f"weftlm experts show {_quoted(path / 'experts')}"
    if kinds[0] == "library":
        shown = wanted in ("model", "routed")
        return f"weftlm route build {_quoted(path)} --to FOLDER" if shown else f"weftlm experts show {_quoted(path)}"
    if "project" in kinds:
        return f"weftlm status {_quoted(path)}"
    if wanted == "model" and (path / "recipe.yaml").exists():
        return f"weftlm train {_quoted(path / 'recipe.yaml')}"  # it has no model yet
    if "run" in kinds or "trained" in kinds:
        return f"weftlm report {_quoted(path)}"
    return f"weftlm serve {_quoted(path)}"


def _owner(path: Path, wanted: Wanted, command: str) -> str:
    """A command on the run folder that a part lies in; where it lies in none, on a recipe."""
    above = kinds_of(path.parent)
    if above and above[0] not in ("data", "scores", "gate"):
        run = path.parent
        if any(kind in TAKEN[wanted] for kind in above) and wanted != "recipe":
            more = " --output FOLDER" if wanted == "export" else " TEXT" if wanted == "routed" else ""
            return f"{command} {_quoted(run)}{more}"
        return _command_for(run, above, wanted, command)
    own = {"data": "weftlm domains", "scores": "weftlm gate fit", "gate": "weftlm gate certify"}
    return f"{own[kinds_of(path)[0]]} RECIPE.yaml, of the recipe it was made by"


def _models_in(run: Path) -> list[Path]:
    """Models of a project that can be served, those over all its experts first."""
    parts = [run / "model", *(each for name in ("routed", "students") for each in sorted((run / name).glob("*")))]
    return [each for each in reversed(parts) if any(kind in _MODELS for kind in kinds_of(each))]


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))

"""What a folder is, and which command takes it, decided by marker files before a command opens anything."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from typer import Context

from weftlm.errors import ConfigError

Wanted = Literal["recipe", "library", "new library", "model", "export", "run", "project", "routed"]
"""What a command's argument is to be."""

KINDS: dict[str, tuple[str, str, str]] = {
    "library": ("an expert library", "library.json", "weftlm experts show {}"),
    "routed": ("a routed model", "routed.json", "weftlm serve {}"),
    "gated": ("a gated model", "modular.json", "weftlm serve {}"),
    "project": ("the run folder of a project (weftlm run)", "stages/recipe.yaml", "weftlm status {}"),
    "trained": ("the run folder of a finished training", "model/*config.json", "weftlm report {}"),
    "run": ("the run folder of a training", "recipe.yaml", "weftlm report {}"),
    "log": ("the run folder of a training", "metrics.jsonl", "weftlm report {}"),
    "data": ("a folder of prepared data", "prepared.json", "weftlm domains RECIPE.yaml"),
    "scores": ("a folder of scores (weftlm score)", "index.json", "weftlm gate fit RECIPE.yaml"),
    "gate": ("the folder of a fitted gate", "fit.json", "weftlm gate certify RECIPE.yaml"),
    "adapter": ("a LoRA adapter", "adapter_config.json", "weftlm serve {}"),
    "plain": ("a model", "config.json", "weftlm serve {}"),
}
"""Kind -> its name, the file by which it is known, a command that takes it; of several kinds the first counts."""

_MODELS = ("routed", "gated", "adapter", "plain", "trained")
TAKEN: dict[Wanted, tuple[str, tuple[str, ...]]] = {
    "recipe": ("a recipe, a file of YAML", ()),
    "library": ("an expert library", ("library",)),
    "new library": ("an expert library", ("library",)),
    "model": ("a model's folder or a hub name", _MODELS),
    "export": ("an expert library, a model's folder or a hub name", ("library", *_MODELS)),
    "run": ("run folders", ("project", "trained", "run", "log")),
    "project": ("the run folder of a project (weftlm run)", ("project",)),
    "routed": ("a routed model (weftlm route build)", ("routed",)),
}
"""The name of each kind of argument, and the kinds of folders it takes."""


def takes(wanted: Wanted) -> Callable[[Context, Any], Any]:
    """A callback of a command's argument that refuses a folder of another kind, and names a command that takes it."""

    def check(context: Context, value: Any) -> Any:
        if not context.resilient_parsing:
            for path in value if isinstance(value, list) else [value]:
                if path is not None:
                    _refuse_another(Path(path), wanted, context.command_path)
        return value

    return check


def _refuse_another(path: Path, wanted: Wanted, command: str) -> None:
    """Refuse a path that a command does not take.

    Raises:
        ConfigError: it is such a path; where it is a folder of weftlm's, the message names a command that takes it.
    """
    said, taken = TAKEN[wanted]
    if wanted == "run" and path.suffix in (".yaml", ".yml"):
        return
    if not path.is_dir():
        if path.exists() and wanted != "recipe":
            raise ConfigError(f"{path} is a file; {command} takes {said}")
        if wanted in ("library", "run", "project", "routed"):
            raise ConfigError(f"there is no folder {path}; {command} takes {said}")
        return  # a hub name, a recipe that is not there, or a library that is to be
    kinds = [kind for kind, (_, mark, _) in KINDS.items() if next(path.glob(mark), None) is not None]
    if any(kind in taken for kind in kinds) or (wanted == "new library" and not kinds):
        return
    if not kinds:
        held = "a folder of none of the kinds weftlm knows" if any(path.iterdir()) else "an empty folder"
        raise ConfigError(f"{path} is {held}; {command} takes {said}")
    name, _, hint = KINDS[kinds[0]]
    raise ConfigError(f"{path} is {name}; {command} takes {said}. Try: {hint.format(shlex.quote(str(path)))}")

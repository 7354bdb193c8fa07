"""What the shell's TAB offers: stages, routers, policies and other values of keys, experts of a library.

Everything is read from the recipe's sections, the registries and a library's manifest; a faulty file offers nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Any, get_args

from typer import Context

COMPLETING = "_WEFTLM_COMPLETE"
"""Set by the shell's completion script: which shell asks."""


def stages(incomplete: str) -> list[str]:
    """Stages of a project."""
    from weftlm.pipeline.stage import stages as known

    return _starting(incomplete, known)


def routers(incomplete: str) -> list[str]:
    """Routers, after the last comma of a list."""
    from weftlm.routing.config import routers as known

    done, comma, last = incomplete.rpartition(",")
    return [f"{done}{comma}{name}" for name in _starting(last, known)]


def experts(ctx: Context, incomplete: str) -> list[str]:
    """Experts of the library (or of the run folder) that the first argument names, after the last comma of a list."""
    folder = next((ctx.params[key] for key in ("library", "model", "recipe") if ctx.params.get(key)), None)
    done, comma, last = incomplete.rpartition(",")
    for manifest in () if folder is None else (Path(folder) / "library.json", Path(folder) / "experts/library.json"):
        try:
            names = json.loads(manifest.read_bytes())["experts"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        return [f"{done}{comma}{name}" for name in _starting(last, names)]
    return []


def settings(incomplete: str) -> list[str]:
    """Keys of a recipe, and after `=` the values a key may have where they can be listed."""
    from weftlm.config import sections_in
    from weftlm.gating.config import gates
    from weftlm.mixture.config import policies
    from weftlm.pipeline.recipe import Recipe

    key, equals, value = incomplete.partition("=")
    *path, last = key.split(".")
    section: Any = Recipe
    for part in path:
        field = section.model_fields.get(part)
        inner = sections_in(field.annotation) if field is not None else []
        if len(inner) != 1:
            return []
        section = inner[0]
    if not equals:
        found = []
        for name in _starting(last, section.model_fields):
            more = sections_in(section.model_fields[name].annotation)
            found.append(".".join([*path, name]) + ("." if more else "="))
        return found
    registries: dict[str, Iterable[str]] = {"mixture.policy": policies, "gating.gate.gate": gates, "gating.gate": gates}
    if last not in section.model_fields:
        return []
    listed = registries.get(key, _literals(section.model_fields[last].annotation))
    return [f"{key}={name}" for name in _starting(value, listed)]


def join_words(environment: MutableMapping[str, str]) -> str:
    """Put `key=value` together where bash has split it at `=`; returns what bash keeps of the word itself."""
    words, place = environment.get("COMP_WORDS", "").split(" "), environment.get("COMP_CWORD", "")
    if not place.isdigit() or "=" not in words[1:]:
        return ""
    current, joined = int(place), words[:1]
    for number, word in enumerate(words[1:], 1):
        if joined[1:] and (word == "=" or joined[-1].endswith("=")):
            joined[-1] += word
            current -= number <= int(place)
        else:
            joined.append(word)
    environment["COMP_WORDS"], environment["COMP_CWORD"] = " ".join(joined), str(current)
    word = joined[current] if current < len(joined) else ""
    return word[: word.rfind("=") + 1]


def _literals(annotation: Any) -> list[str]:
    """Values of the `Literal`s and the truth values in an annotation."""
    if annotation is bool:
        return ["false", "true"]
    return [each for part in get_args(annotation) for each in ([part] if isinstance(part, str) else _literals(part))]


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))


def prepare_shell() -> None:
    """Make bash's words whole before they are completed, where a completion is asked for."""
    if os.environ.get(COMPLETING, "").endswith("bash"):
        join_words(os.environ)

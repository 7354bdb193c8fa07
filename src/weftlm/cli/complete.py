"""Shell completion of stages, routers, experts, and keys of a recipe, read from sections, registries and libraries."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from typer import Context


def stages(incomplete: str) -> list[str]:
    """Stages of a project."""
    from weftlm.pipeline.stage import stages as known

    return _starting(incomplete, known)


def routers(incomplete: str) -> list[str]:
    """Routers, after the last comma of a list."""
    from weftlm.routing.config import routers as known

    done, comma, last = incomplete.rpartition(",")
    return [f"{done}{comma}{name}" for name in _starting(last, known)]


def experts(context: Context, incomplete: str) -> list[str]:
    """Experts of the library that the call names."""
    from weftlm.errors import WeftError
    from weftlm.pipeline.expert_library import list_experts

    try:
        found = list_experts(Path(context.params["library"]))
    except (KeyError, TypeError, WeftError):
        return []
    return _starting(incomplete, (each["name"] for each in found))


def settings(incomplete: str) -> list[str]:
    """Keys of a recipe, and after `=` the registered policies and gates."""
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
        found = _starting(last, section.model_fields)
        ends = ["." if sections_in(section.model_fields[name].annotation) else "=" for name in found]
        return [".".join([*path, name]) + end for name, end in zip(found, ends, strict=True)]
    registries: dict[str, Iterable[str]] = {"mixture.policy": policies, "gating.gate.gate": gates, "gating.gate": gates}
    return [f"{key}={name}" for name in _starting(value, registries.get(key, ()))]


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))

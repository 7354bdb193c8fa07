"""Strict configuration sections and the YAML a recipe is read from.

Every section of a recipe is a `Section`: unknown keys are errors with a suggestion, nothing is coerced silently, and a
resolved section can be written back with every default spelled out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from weftlm.errors import ConfigError


class Section(BaseModel):
    """Base of every recipe section: frozen, no unknown keys, defaults validated too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


S = TypeVar("S", bound=BaseModel)

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest known name, else the list of what is allowed."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(names)}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not hold a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}") from error
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"recipe {path} holds {type(value).__name__}; it must hold a mapping of sections")
    return value


def apply_overrides(recipe: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=value` overrides to a nested mapping; the value is read as YAML, a numeric part indexes a list.

    Raises:
        ConfigError: an override has no `=`, an empty key, or steps into something that has no keys.
    """
    result: dict[str, Any] = yaml.safe_load(yaml.safe_dump(dict(recipe)))
    for override in overrides:
        key, equals, raw = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"--set {override!r} is not of the form section.key=value")
        try:
            value = yaml.safe_load(raw)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from error
        if isinstance(value, str):
            value = _number_or_text(value)
        here: Any = result
        for part in parts[:-1]:
            here = _step(here, part, override)
        if isinstance(here, list):
            here[_index(here, parts[-1], override)] = value
        elif isinstance(here, dict):
            here[parts[-1]] = value
        else:
            raise ConfigError(f"--set {override!r}: {'.'.join(parts[:-1])} is {here!r} and has no keys")
    return result


def _number_or_text(value: str) -> float | str:
    """YAML 1.1 reads `3e-4` as text; a person who types it means a number."""
    return float(value) if _EXPONENT.fullmatch(value) else value


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"--set {override!r}: {part!r} is not a position in a list of {len(items)}")
    return int(part)


def _step(here: Any, part: str, override: str) -> Any:
    if isinstance(here, list):
        return here[_index(here, part, override)]
    if not isinstance(here, dict):
        raise ConfigError(f"--set {override!r}: cannot step into {here!r} with {part!r}")
    if here.get(part) is None:
        here[part] = {}
    return here[part]


def validate(section: type[S], value: Any, where: str) -> S:
    """Validate `value` as `section`, turning pydantic's report into one ConfigError that names every wrong key.

    Args:
        section: the pydantic model.
        value: what the user wrote.
        where: the dotted place in the recipe, for the message; empty for the whole recipe.
    Raises:
        ConfigError: with one line per problem, and a suggestion for each unknown key.
    """
    try:
        return section.model_validate(value)
    except ValidationError as error:
        raise ConfigError(explain(section, error, where)) from None


def explain(section: type[BaseModel], error: ValidationError, where: str) -> str:
    """One line per problem of a pydantic report: place, what came, what is allowed."""
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"])
        full = ".".join(part for part in (where, place) if part)
        if problem["type"] == "extra_forbidden":
            known = _keys_at(section, problem["loc"][:-1])
            hint = did_you_mean(str(problem["loc"][-1]), known) if known else ""
            lines.append(f"{full}: unknown key{hint}")
        elif problem["type"] == "missing":
            lines.append(f"{full}: missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{full or 'recipe'}: {message} (got {problem['input']!r:.120})")
    return "\n".join(lines)


def _keys_at(section: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """The field names allowed at a place inside a section, or [] where the place cannot be followed."""
    here: type[BaseModel] = section
    for part in loc:
        if isinstance(part, int):
            continue
        field = here.model_fields.get(part)
        models = _models_in(field.annotation) if field is not None else []
        if len(models) != 1:
            return []
        here = models[0]
    return list(here.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]

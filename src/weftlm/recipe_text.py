"""The text of a recipe: YAML, read strictly and with a bound on everything.

A recipe is one document of mappings, lists, text, numbers, true, false and null. What YAML has beyond that, and what
people never mean, is an error with its line: keys given twice or not text, tags, endless numbers, values nested within
themselves, aliases that unfold to more than a recipe can hold.
"""

from __future__ import annotations

import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from weftlm.errors import ConfigError, reason
from weftlm.places import near

MAX_BYTES = 256_000
"""Largest recipe in bytes; a longer file is refused before it is read."""
MAX_DEPTH = 64
"""Sections within sections."""
MAX_VALUES = 100_000
"""Values of a recipe, aliases unfolded."""
MAX_NUMBER = 2**63 - 1
"""Largest number, and its negative the smallest."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_NUMBERS_ELSEWHERE = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a recipe's file into plain values.

    Raises:
        ConfigError: there is no such file, it is none that can be read, or as `parse_yaml`; or it holds no mapping.
    """
    value = parse_yaml(_text_of(path), f"recipe {path}")
    if not isinstance(value, dict):
        held = "nothing" if value is None else _kind(value)
        raise ConfigError(f"recipe {path} holds {held}; it must hold a mapping of sections, such as `run: runs/first`")
    return value


def _text_of(path: str | Path) -> str:
    shown = f"{os.fspath(path)!s:.200}"
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise ConfigError(f"{shown} is a folder; give a recipe, a file of YAML{_recipes_in(Path(path))}")
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"recipe {shown} is no regular file (a pipe, socket or device); give a file of YAML")
        if found.st_size > MAX_BYTES:
            raise ConfigError(
                f"recipe {shown} has {found.st_size:,} bytes; a recipe has at most {MAX_BYTES:,}. Is it the data?"
            )
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"recipe {shown} cannot be read: {reason(error)}{near(path)}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {shown} cannot be read: {reason(error)}; save it as UTF-8") from None


def _recipes_in(folder: Path) -> str:
    try:
        names = sorted(each.name for each in folder.iterdir() if each.suffix in (".yaml", ".yml"))
    except OSError:
        return ""
    return f"; in it: {', '.join(names[:5])}" if names else ""


def parse_yaml(text: str, what: str) -> Any:
    """One YAML document as plain values.

    Args:
        text: Text of the document.
        what: Name of it, for messages.
    Raises:
        ConfigError: the text is not YAML, holds several documents, or what a recipe may not hold.
    """
    if (bad := _CONTROL.search(text)) is not None:
        line = text.count("\n", 0, bad.start()) + 1
        raise ConfigError(f"{what}, line {line}: a control character ({bad.group()!r}); a recipe is plain text")
    try:
        _check_events(text, what)
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        tabs = "; indent with spaces, not with tabs" if re.search(r"^\s*\t", text, re.MULTILINE) else ""
        raise ConfigError(f"{what} is not valid YAML: {place}{error.problem or error.context}{tabs}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not valid YAML: {getattr(error, 'reason', 'it cannot be parsed')}") from None
    return None if node is None else _Values(what).value(node, ())


def _check_events(text: str, what: str) -> None:
    """Refuse tags, further documents and endless nesting, before any value is built."""
    documents = depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        tag = getattr(event, "tag", None)
        if documents > 1:
            raise _refusal(what, event, "a second document begins (---); a recipe is one document")
        if depth > MAX_DEPTH:
            raise _refusal(what, event, f"values nested more than {MAX_DEPTH} deep")
        if tag is not None and tag != "!":
            shown = tag.replace(_TAG, "!!")
            raise _refusal(what, event, f"a tag ({shown:.60}); a recipe takes plain values without tags")


def _refusal(what: str, place: Any, problem: str) -> ConfigError:
    return ConfigError(f"{what}, line {place.start_mark.line + 1}: {problem}")


class _Values:
    """Builds plain values from the nodes of a document; aliases are unfolded, and everything is counted."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.count = 0

    def value(self, node: Any, above: tuple[Any, ...]) -> Any:
        self.count += 1
        if any(node is each for each in above):
            raise _refusal(self.what, node, "a value that is part of itself by an alias (*name)")
        if len(above) > MAX_DEPTH:
            raise _refusal(self.what, node, f"values nested more than {MAX_DEPTH} deep, aliases (*name) unfolded")
        if self.count > MAX_VALUES:
            problem = f"more than {MAX_VALUES:,} values, aliases (*name) unfolded; shorten the recipe"
            raise _refusal(self.what, node, problem)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(each, (*above, node)) for each in node.value]
        return self._mapping(node, (*above, node))

    def _mapping(self, node: Any, above: tuple[Any, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        merged: list[Any] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refusal(self.what, key_node, "a key that is no plain text; keys are names")
            value = self.value(value_node, above)
            if key_node.tag == f"{_TAG}merge":
                merged += value if isinstance(value, list) else [value]
                if not all(isinstance(each, dict) for each in merged):
                    raise _refusal(self.what, key_node, "<< takes a mapping, or a list of mappings")
                continue
            key = self.value(key_node, above)
            if not isinstance(key, str):
                problem = f"the key {key_node.value:.60} is {_kind(key)}; keys are text: write it in quotes"
                raise _refusal(self.what, key_node, problem)
            if key in lines:
                problem = f"the key {key!r:.60} comes twice, first in line {lines[key]}; leave one of the two"
                raise _refusal(self.what, key_node, problem)
            lines[key] = key_node.start_mark.line + 1
            found[key] = value
        for each in merged:
            found = {**each, **found}
        return found

    def _scalar(self, node: Any) -> Any:
        text: str = node.value
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise _refusal(
                self.what, node, "text with a character that no path or name can hold (NUL, or half a character)"
            )
        tag = node.tag.removeprefix(_TAG)
        if tag == "null":
            return None
        if tag == "bool":
            return text.lower() in ("yes", "true", "on")
        if tag not in ("int", "float") or _NUMBERS_ELSEWHERE.fullmatch(text):
            return text
        plain = text.replace("_", "").lower()
        try:
            number = int(plain, 0) if tag == "int" else float(plain.replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            return text
        if (tag == "int" and abs(number) > MAX_NUMBER) or not math.isfinite(number):
            problem = f"{text:.40} is too large or no number; whole numbers go to 2^63 - 1, others must be finite"
            raise _refusal(self.what, node, problem)
        return number


def parse_override(text: str, what: str) -> Any:
    """The value of `a.b=value`: YAML, and numbers such as 3e-4 as a person means them.

    Raises:
        ConfigError: as `parse_yaml`.
    """
    value = parse_yaml(text, what)
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        if not math.isfinite(number := float(value)):
            raise ConfigError(f"{what}: {value} is too large")
        return number
    return value


def _kind(value: Any) -> str:
    """What a value is, in a word a person knows."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "a mapping"

"""The text of a recipe: YAML, read strictly and with a bound on everything.

A recipe is one document of mappings, lists, text, numbers, true, false and null. What YAML has beyond that, and what
people never mean, is an error with its line: keys given twice or not text, tags, endless numbers, values nested within
themselves, aliases that unfold to more than a recipe can hold.
"""

from __future__ import annotations

import copy
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from weftlm.errors import ConfigError, reason
from weftlm.places import near

MAX_BYTES = 256_000
"""Of a recipe; a longer file is refused before it is read."""
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
_MERGE = object()
_OPEN = object()


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a recipe's file into plain values.

    Raises:
        ConfigError: there is no such file, it is none that can be read, or as `parse_yaml`; or it holds no mapping.
    """
    text = _text_of(path)
    value = parse_yaml(text, f"recipe {path}")
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
        text: of the document.
        what: it is, for messages.
    Raises:
        ConfigError: the text is not YAML, holds several documents, or what a recipe may not hold.
    """
    if (bad := _CONTROL.search(text)) is not None:
        line = text.count("\n", 0, bad.start()) + 1
        raise ConfigError(f"{what}, line {line}: a control character ({bad.group()!r}); a recipe is plain text")
    try:
        return _Reader(text, what).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        tabs = "; indent with spaces, not with tabs" if re.search(r"^\s*\t", text, re.MULTILINE) else ""
        raise ConfigError(f"{what} is not valid YAML: {place}{error.problem or error.context}{tabs}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not valid YAML: {getattr(error, 'reason', 'it cannot be parsed')}") from None


class _Reader:
    """Builds plain values from the events of a parser, and stops at the first thing that may not be there."""

    def __init__(self, text: str, what: str) -> None:
        self.what = what
        self.loader = _LOADER(text)
        self.values = 0
        self.anchors: dict[str, tuple[Any, int, int]] = {}

    def refuse(self, event: Any, problem: str) -> ConfigError:
        return ConfigError(f"{self.what}, line {_line(event)}: {problem}")

    def document(self) -> Any:
        events = iter(self._events())
        value, seen = None, False
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if seen:
                    raise self.refuse(event, "a second document begins (---); a recipe is one document")
                seen = True
                value, _ = self._value(next(events), events, 0)
        return value

    def _events(self) -> Iterator[Any]:
        try:
            while self.loader.check_event():
                yield self.loader.get_event()
        finally:
            self.loader.dispose()

    def _count(self, event: Any, number: int) -> None:
        self.values += number
        if self.values > MAX_VALUES:
            raise self.refuse(event, f"more than {MAX_VALUES:,} values, aliases (*name) unfolded; shorten the recipe")

    def _value(self, event: Any, events: Iterator[Any], depth: int) -> tuple[Any, int]:
        """A value and how deep it is in itself."""
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, depth)
        if event.tag is not None and event.tag != "!":
            shown = event.tag.replace(_TAG, "!!")
            raise self.refuse(event, f"a tag ({shown:.60}); a recipe takes plain values without tags")
        if depth > MAX_DEPTH:
            raise self.refuse(event, f"values nested more than {MAX_DEPTH} deep")
        before = self.values
        self._count(event, 1)
        if event.anchor is not None:
            self.anchors[event.anchor] = (_OPEN, 0, 0)
        value: Any
        height = 0
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(inner := next(events), yaml.SequenceEndEvent):
                item, deep = self._value(inner, events, depth + 1)
                value.append(item)
                height = max(height, deep + 1)
        else:
            value, height = self._mapping(events, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = (value, self.values - before, height)
        return value, height

    def _alias(self, event: Any, depth: int) -> tuple[Any, int]:
        if event.anchor not in self.anchors:
            raise self.refuse(event, f"*{event.anchor} names no value; an anchor &{event.anchor} must come before")
        value, size, height = self.anchors[event.anchor]
        if value is _OPEN:
            raise self.refuse(event, f"*{event.anchor} is part of the value it stands for")
        self._count(event, size)
        if depth + height > MAX_DEPTH:
            raise self.refuse(event, f"values nested more than {MAX_DEPTH} deep, aliases (*name) unfolded")
        return copy.deepcopy(value), height

    def _mapping(self, events: Iterator[Any], depth: int) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        merged: list[Any] = []
        height = 0
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise self.refuse(event, "a key that is no plain text; keys are names")
            key, _ = self._value(event, events, depth + 1)
            value, deep = self._value(next(events), events, depth + 1)
            height = max(height, deep + 1)
            if key is _MERGE:
                merged += value if isinstance(value, list) else [value]
                if not all(isinstance(each, dict) for each in merged):
                    raise self.refuse(event, "<< takes a mapping, or a list of mappings")
                continue
            if not isinstance(key, str):
                raise self.refuse(
                    event, f"the key {event.value:.60} is {_kind(key)}; keys are text: write it in quotes"
                )
            if key in lines:
                raise self.refuse(
                    event, f"the key {key!r:.60} comes twice, first in line {lines[key]}; leave one of the two"
                )
            lines[key] = _line(event)
            found[key] = value
        for each in merged:
            for key, value in each.items():
                found.setdefault(key, copy.deepcopy(value))
        return found, height

    def _scalar(self, event: Any) -> Any:
        text: str = event.value
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise self.refuse(event, "text with a character that no path or name can hold (NUL, or half a character)")
        tag = self.loader.resolve(yaml.ScalarNode, text, event.implicit).removeprefix(_TAG)
        if tag == "merge":
            return _MERGE
        if tag == "null":
            return None
        if tag == "bool":
            return text.lower() in ("yes", "true", "on")
        if tag not in ("int", "float") or _NUMBERS_ELSEWHERE.fullmatch(text):
            return text
        return self._number(event, text, whole=tag == "int")

    def _number(self, event: Any, text: str, *, whole: bool) -> int | float | str:
        plain = text.replace("_", "").lower()
        try:
            if whole:
                value: int | float = int(plain, 0) if len(plain) < 100 else MAX_NUMBER + 1
            else:
                value = float(plain.replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            return text
        if not whole and value - value != 0:
            raise self.refuse(event, f"{text:.60} is no number a recipe can hold; give a finite one")
        if abs(value) > MAX_NUMBER and whole:
            raise self.refuse(event, f"{text:.40} is too large; whole numbers go to 2^63 - 1")
        return value


def parse_override(text: str, what: str) -> Any:
    """The value of `a.b=value`: YAML, and numbers such as 3e-4 as a person means them.

    Raises:
        ConfigError: as `parse_yaml`.
    """
    value = parse_yaml(text, what)
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        number = float(value)
        if number - number != 0:
            raise ConfigError(f"{what}: {value} is too large")
        return number
    return value


def _line(event: yaml.Event) -> int:
    """Counted from 1."""
    return 1 if event.start_mark is None else event.start_mark.line + 1


def _kind(value: Any) -> str:
    """What a value is, in a word a person knows."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "a mapping"

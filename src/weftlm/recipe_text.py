"""The text of a recipe: YAML, read strictly and with a bound on everything.

A recipe is one document of mappings, lists, text, numbers, true, false and null. What YAML has beyond that, and what
people never mean, is an error with its line: keys given twice or not text, tags, endless numbers, values nested within
themselves, aliases that unfold to more than a recipe can hold.
"""

from __future__ import annotations

import json
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
_OTHER_NUMBERS = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
"""Numbers to YAML and to nobody else: of base 8 and of base 60."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a recipe's file into plain values.

    Raises:
        ConfigError: there is no such file, it is none that can be read, or as `parse_yaml`; or it holds no mapping.
    """
    value = parse_yaml(_text_of(path), f"recipe {path}")
    if not isinstance(value, dict):
        held = "nothing" if value is None else f"a {type(value).__name__}"
        raise ConfigError(f"recipe {path} holds {held}; it must hold a mapping of sections, such as `run: runs/first`")
    return value


def _text_of(path: str | Path) -> str:
    shown = f"recipe {os.fspath(path)!s:.200}"
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{shown} is no regular file (a folder, pipe, socket or device); give a file of YAML")
        if found.st_size > MAX_BYTES:
            raise ConfigError(
                f"{shown} has {found.st_size:,} bytes; a recipe has at most {MAX_BYTES:,}. Is it the data?"
            )
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown} cannot be read: {reason(error)}; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{shown} cannot be read: {reason(error)}{near(path)}") from None


def parse_yaml(text: str, what: str) -> Any:
    """One YAML document as plain values.

    Args:
        text: Text of the document.
        what: Name of it, for messages.
    Raises:
        ConfigError: the text is not YAML, holds several documents, or what a recipe may not hold.
    """
    try:
        _check_events(text)
        value = yaml.load(text, Loader=_PlainLoader)  # noqa: S506 - a safe loader with less to it
        return json.loads(json.dumps(value))  # what aliases share is one value no more
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f", line {mark.line + 1}"
        tabs = "; indent with spaces, not with tabs" if re.search(r"^\s*\t", text, re.MULTILINE) else ""
        said = f"not valid YAML: {error.problem or error.context}"
        said = str(error.problem) if isinstance(error, _RefusedError) else said
        raise ConfigError(f"{what}{place}: {said}{tabs}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not valid YAML: {getattr(error, 'reason', 'it cannot be parsed')}") from None


class _RefusedError(yaml.MarkedYAMLError):
    """YAML that is no recipe."""

    def __init__(self, place: Any, problem: str) -> None:
        super().__init__(problem=problem, problem_mark=place.start_mark)


def _check_events(text: str) -> None:
    """Refuse tags, further documents, endless nesting and aliases that unfold to too much, before a value is built.

    A collection counts the values in it, and an alias (*name) as many as the value it stands for.
    """
    documents = 0
    anchors: dict[str, tuple[int, int]] = {}
    open_: list[tuple[str | None, int, int]] = [(None, 0, 0)]  # anchor, values so far and depth of what they hold
    for event in yaml.parse(text, Loader=_LOADER):
        documents += isinstance(event, yaml.DocumentStartEvent)
        if documents > 1:
            raise _RefusedError(event, "a second document begins (---); a recipe is one document")
        tag, anchor = getattr(event, "tag", None), getattr(event, "anchor", None)
        if tag is not None and tag != "!":
            shown = tag.replace(_TAG, "!!")
            raise _RefusedError(event, f"a tag ({shown:.60}); a recipe takes plain values without tags")
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((anchor, 0, 0))
            found = 0, 0
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, values, depth = open_.pop()
            found = values + 1, depth + 1
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == each for each, *_ in open_):
                raise _RefusedError(event, "a value that is part of itself by an alias (*name)")
            found = anchors.get(str(anchor), (0, 0))
        else:
            found = int(isinstance(event, yaml.ScalarEvent)), 0
        if anchor is not None and not isinstance(event, yaml.CollectionStartEvent | yaml.AliasEvent):
            anchors[anchor] = found
        name, values, depth = open_[-1]
        open_[-1] = name, values + found[0], max(depth, found[1])
        if len(open_) + open_[-1][2] > MAX_DEPTH:
            raise _RefusedError(event, f"values nested more than {MAX_DEPTH} deep, aliases (*name) unfolded")
        if open_[-1][1] > MAX_VALUES:
            raise _RefusedError(event, f"more than {MAX_VALUES:,} values, aliases (*name) unfolded; shorten the recipe")


class _PlainLoader(_LOADER):  # type: ignore[misc]
    """Mappings whose keys are text and come once, lists, and scalars as people mean them."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == f"{_TAG}merge":
                continue
            if key.tag != f"{_TAG}str":
                shown = f"{key.value:.60}" if isinstance(key.value, str) else "of several values"
                raise _RefusedError(key, f"the key {shown} is no text; keys are text: write it in quotes")
            if key.value in lines:
                first = lines[key.value]
                raise _RefusedError(
                    key, f"the key {key.value!r:.60} comes twice, first in line {first}; leave one of the two"
                )
            lines[key.value] = key.start_mark.line + 1
        found: dict[str, Any] = super().construct_mapping(node, deep)
        return found

    def construct_text(self, node: Any) -> str:
        """Text that a path or a name can hold."""
        text: str = node.value
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise _RefusedError(node, "text with a character that no path or name can hold (NUL, or half a character)")
        return text

    def construct_number(self, node: Any) -> Any:
        """A number of bounded size, or the text that no other program takes for one."""
        if _OTHER_NUMBERS.fullmatch(node.value):
            return node.value
        whole = node.tag == f"{_TAG}int"
        try:
            number = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or (whole and abs(number) > MAX_NUMBER):
            problem = f"{node.value:.40} is too large or no number; whole numbers go to 2^63 - 1, others must be finite"
            raise _RefusedError(node, problem)
        return number


for _name, _construct in {
    "int": _PlainLoader.construct_number,
    "float": _PlainLoader.construct_number,
    "str": _PlainLoader.construct_text,
    "timestamp": _PlainLoader.construct_text,
    "value": _PlainLoader.construct_text,  # =
    "merge": _PlainLoader.construct_text,  # << as a value
}.items():
    _PlainLoader.add_constructor(_TAG + _name, _construct)
_PlainLoader.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)  # 3e-4, which YAML takes for text

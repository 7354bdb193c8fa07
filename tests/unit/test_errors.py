"""What a library or the system says reaches people through `reason` alone."""

from __future__ import annotations

import ast
import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import weftlm
from weftlm import errors
from weftlm.errors import ConfigError, WeftError, reason

SOURCE = Path(weftlm.__file__).parent
OWN = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, WeftError)}
OWN |= {"ApiError", "QueueFullError", "SamplerExhausted"}
AS_IT_IS = {
    "serving/engine.py", "serving/stepping.py",  # to the log, with the exception's name
    # to the client whose body or template is wrong
    "serving/app.py", "serving/limits.py", "serving/chat_template.py", "serving/prompts.py",
    "corpora/formats.py",  # csv's own words are about the text
}  # fmt: skip
"""Files that show what an exception says in another way, and to whom."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), "no such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EADDRINUSE, "Address already in use"), "address already in use"),
        (KeyError("step"), "'step' is missing or unknown"),
        (ValueError(), "ValueError"),
        (ValueError("first\nline\n\nlong advice"), "first line"),
        (ConfigError("ours, " + "whole " * 60), "ours, " + "whole " * 60),
        (RecursionError("maximum recursion depth exceeded"), "its values are nested too deep"),
        (json.JSONDecodeError("Expecting value", "{", 1), "it is not valid JSON (line 1, column 2: Expecting value)"),
    ],
)
def test_reasons_are_in_words(error: BaseException, said: str) -> None:
    assert reason(error) == said


def _kinds(caught: ast.expr | None) -> set[str]:
    if isinstance(caught, ast.Tuple):
        return set().union(*map(_kinds, caught.elts))
    return {caught.attr if isinstance(caught, ast.Attribute) else getattr(caught, "id", "anything")}


def _shown(handler: ast.ExceptHandler) -> Iterator[int]:
    """Lines at which the caught exception itself goes into a text."""
    for node in ast.walk(handler):
        called = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("str", "repr") and node.args
        value = node.value if isinstance(node, ast.FormattedValue) else node.args[0] if called else None  # type: ignore[attr-defined]
        if isinstance(value, ast.Name) and value.id == handler.name:
            yield node.lineno  # type: ignore[attr-defined]


def test_no_message_shows_what_a_library_raised_as_it_is() -> None:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        name = str(path.relative_to(SOURCE))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ExceptHandler) or name in AS_IT_IS:
                continue
            foreign = {kind for kind in _kinds(node.type) - OWN if not kind.startswith("_")}
            if foreign and foreign != {"KeyError"}:  # a KeyError is the key
                found += [f"{name}:{line}" for line in _shown(node)]
    assert not found

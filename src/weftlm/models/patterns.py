"""Regular expressions from files and recipes, matched within a bound.

A short pattern can take years on a short name, and `re` cannot be interrupted. So patterns that are more than a literal
name are matched in a process of their own, which ends when its time or memory is used up.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from weftlm.errors import ConfigError

MAX_PATTERN = 4096
"""Largest length of one pattern, in characters."""

_LITERAL = re.compile(r"\^?(?:[\w.-]|\\[^\w\s])*", re.ASCII)
"""A name, perhaps with escapes. An unescaped dot matches any one character, which costs no time."""
_WAIT_S = 20.0
"""The other process has one second of processor time; on a busy machine it waits longer for it."""
_PROGRAM = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
try:
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
except (OSError, ValueError):
    pass
patterns, names = json.load(sys.stdin)
found = []
for pattern in patterns:
    try:
        compiled = re.compile(pattern)
        found.append([compiled.fullmatch(name) is not None for name in names])
    except Exception as error:
        found.append(str(error) or type(error).__name__)
json.dump(found, sys.stdout)
"""


def matches(patterns: Sequence[str], names: Sequence[str], what: str, *, tail: bool = False) -> list[list[bool]]:
    r"""Which names each pattern matches.

        matches([r"model\.layers\.[01]\..*q_proj"], ["model.layers.1.self_attn.q_proj"], "target_modules")
        -> [[True]]

    Args:
        patterns: regular expressions.
        names: of modules.
        what: the setting they come from, for messages.
        tail: match the end of a name from any dot on too, `(.*\.)?(pattern)`; else the whole name.
    Returns:
        for each pattern, for each name.
    Raises:
        ConfigError: a pattern is no regular expression or longer than `MAX_PATTERN`, or matching takes more than a
            second of processor time or 1 GiB of memory.
    """
    for pattern in patterns:
        if len(pattern) > MAX_PATTERN:
            raise ConfigError(f"{what} has a pattern of {len(pattern):,} characters; the limit is {MAX_PATTERN:,}")
    hard = [pattern for pattern in patterns if not _LITERAL.fullmatch(pattern)]
    found = dict(zip(hard, _in_a_process(hard, names, what, tail), strict=True)) if hard else {}
    return [found[pattern] if pattern in found else _literally(pattern, names, tail) for pattern in patterns]


def _literally(pattern: str, names: Sequence[str], tail: bool) -> list[bool]:
    compiled = re.compile(pattern)
    return [
        any(
            compiled.fullmatch(name, start) is not None
            for start in ([0, *(place + 1 for place, letter in enumerate(name) if letter == ".")] if tail else [0])
        )
        for name in names
    ]


def _in_a_process(patterns: Sequence[str], names: Sequence[str], what: str, tail: bool) -> list[list[bool]]:
    shown = f"{patterns[0]!r:.80}" if len(patterns) == 1 else f"one of its {len(patterns)} patterns"
    cure = "write it with module names and simple wildcards, or list the modules"
    asked = [rf"(.*\.)?({pattern})" for pattern in patterns] if tail else list(patterns)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps([asked, list(names)]),
            capture_output=True,
            text=True,
            timeout=_WAIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode != 0:
        raise ConfigError(f"{what}: {shown} needs too much time or memory to match; {cure}")
    found: list[list[bool]] = []
    for pattern, result in zip(patterns, json.loads(done.stdout), strict=True):
        if isinstance(result, str):
            raise ConfigError(f"{what}: {pattern!r:.80} is not a regular expression ({result}); {cure}")
        found.append(result)
    return found

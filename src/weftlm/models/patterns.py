"""What the settings of an adapter that name modules mean: full names, ends of names, regular expressions.

Expressions come from files and recipes, and are matched within a bound of time: a short pattern can take years on a
short name, and `re` cannot be interrupted; `regex` can.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import regex

from weftlm.errors import ConfigError, reason

MAX_PATTERN = 4096
"""Largest length of one pattern, in characters."""
MAX_SECONDS = 2.0
"""Largest time for all names of a setting's patterns."""


def named_by(entries: str | Sequence[str], names: Sequence[str], what: str) -> dict[str, set[str]]:
    """The modules that each entry of a setting means, as PEFT reads it.

    A text is a regular expression of whole names; an entry of a list is the end of names, from a dot or the start on.

    Args:
        entries: Setting.
        names: Names of modules.
        what: The setting's name, for messages.
    Raises:
        ConfigError: as `matches`.
    """
    if isinstance(entries, str):
        (hits,) = matches([entries], names, what)
        return {entries: {name for name, hit in zip(names, hits, strict=True) if hit}}
    ends: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for first in range(len(parts)):
            ends.setdefault(".".join(parts[first:]), set()).add(name)
    return {each: ends.get(each, set()) for each in entries}


def matches(patterns: Sequence[str], names: Sequence[str], what: str, *, tail: bool = False) -> list[list[bool]]:
    r"""Which names each pattern matches.

        matches([r"model\.layers\.[01]\..*q_proj"], ["model.layers.1.self_attn.q_proj"], "target_modules")
        -> [[True]]

    Args:
        patterns: Regular expressions.
        names: Names of modules.
        what: The setting they come from, for messages.
        tail: Match the end of a name from any dot on too, `(.*\.)?(pattern)`; else the whole name.
    Returns:
        For each pattern, for each name.
    Raises:
        ConfigError: a pattern is no regular expression or longer than `MAX_PATTERN`, or matching takes more than
            `MAX_SECONDS`.
    """
    cure = "write it with module names and simple wildcards, or list the modules"
    end = time.monotonic() + MAX_SECONDS
    found = []
    for pattern in patterns:
        if len(pattern) > MAX_PATTERN:
            raise ConfigError(f"{what} has a pattern of {len(pattern):,} characters; the limit is {MAX_PATTERN:,}")
        try:
            compiled = regex.compile(rf"(.*\.)?({pattern})" if tail else pattern)
            hits = [compiled.fullmatch(name, timeout=max(0.01, end - time.monotonic())) is not None for name in names]
        except (regex.error, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"{what}: {pattern!r:.80} is not a regular expression ({reason(error)}); {cure}"
            ) from error
        except (TimeoutError, MemoryError) as error:
            raise ConfigError(f"{what}: {pattern!r:.80} needs too much time or memory to match; {cure}") from error
        found.append(hits)
    return found

"""Text that came as data, made fit for a person's eyes: one line, nothing hidden, nothing that acts on a terminal."""

from __future__ import annotations

_JOINERS = "\u200c\u200d"
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800")
"""Letters and symbols without a shape, which Python calls printable."""


def printable(text: object) -> str:
    r"""Text on one line in which every character can be seen; it has no effect on a terminal, a log or a page.

    Control characters (line breaks, ANSI escapes), marks that reorder text, characters without width and lone
    surrogates are written as Python writes them: `\x1b[2J`, `\u202e`. Joiners stay between letters and emoji that use
    them. Names of domains, experts, runs and models may hold anything; whatever prints them calls this.

    Example:
        >>> printable("[/news]\x1b[2J")
        '[/news]\\x1b[2J'
    """
    text = str(text)
    if text.isprintable() and _BLANK.isdisjoint(text):
        return text
    shown, before = [], ""
    for character in text:
        joins = character in _JOINERS and not before.isascii()
        plain = (character.isprintable() and character not in _BLANK) or joins or _is_visible_space(character)
        shown.append(character if plain else character.encode("unicode_escape", "surrogatepass").decode("ascii"))
        before = character
    return "".join(shown)


def printable_lines(text: object) -> str:
    """The same for text of several lines: line breaks stay."""
    return "\n".join(map(printable, str(text).split("\n")))


def shorten(text: object, limit: int = 26) -> str:
    """The same in at most `limit` characters: the middle is left out."""
    shown = printable(text)
    if len(shown) <= limit:
        return shown
    head = (limit - 1) * 2 // 3
    return shown[:head] + "…" + shown[len(shown) - (limit - 1 - head) :]


def _is_visible_space(character: str) -> bool:
    """No-break and wide spaces: they take their place and end no line."""
    return character.isspace() and character in "\u00a0\u2002\u2003\u2009\u202f\u3000"

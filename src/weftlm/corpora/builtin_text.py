"""From pieces of files to documents: C++ and JSON taken apart, paragraphs de-duplicated, pieces packed.

A document has between `LEAST_CHARS` and `MOST_CHARS` characters (a rest may add `LEAST_CHARS`), holds neighbouring
pieces of one file, and is closed at the piece that would take it past `USUAL_CHARS`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from weftlm.corpora.builtin_python import Piece

LEAST_CHARS = 500
USUAL_CHARS = 3000
MOST_CHARS = 6000
_LEAST_REPEAT_CHARS = 40
_BLANK = re.compile(r"\n[ \t]*\n\s*?(?=[^\n])")
_CPP = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)


class Repeats:
    """Remembers paragraphs, to drop those seen before; shorter than 40 characters they may repeat."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def is_new(self, paragraph: str) -> bool:
        """Whether a paragraph, blanks and case of whitespace aside, comes for the first time."""
        words = " ".join(paragraph.split())
        if len(words) < _LEAST_REPEAT_CHARS:
            return True
        digest = hashlib.blake2b(words.encode("utf-8", "replace"), digest_size=12).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True

    def drop(self, text: str) -> str:
        """The text without paragraphs seen before, in this text or an earlier one."""
        return "\n\n".join(part for part in paragraphs(text) if self.is_new(part))


def paragraphs(text: str) -> list[str]:
    """The blank-line separated parts of a text, indentation kept."""
    return [part.strip("\n").rstrip() for part in _BLANK.split(text) if part.strip()]


def cpp_pieces(source: str) -> Iterator[Piece]:
    """C++ without comments, as one piece."""
    text = _CPP.sub(lambda found: found.group() if found.group()[0] in "\"'" else "", source)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    text = re.sub(r"\n{3,}", "\n\n", text).strip("\n")
    if text:
        yield Piece("", text)


def text_pieces(source: str) -> Iterator[Piece]:
    """The whole text, trailing blanks removed, as one piece."""
    text = "\n".join(line.rstrip() for line in source.split("\n")).strip("\n")
    if text:
        yield Piece("", text)


def json_pieces(repeats: Repeats) -> Callable[[str], Iterator[Piece]]:
    """A splitter of JSON text into valid JSON values of at most `MOST_CHARS`, repeated list items dropped."""

    def pieces(source: str) -> Iterator[Piece]:
        try:
            value = json.loads(source)
        except (ValueError, RecursionError):
            return
        yield from _json(value, "$", repeats)

    return pieces


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")


def _json(value: Any, path: str, repeats: Repeats) -> Iterator[Piece]:
    if not isinstance(value, dict | list) or not value:
        return
    entries = list(value.items() if isinstance(value, dict) else enumerate(value))
    group: list[tuple[Any, Any]] = []
    size = 0

    def close() -> Piece:
        held = dict(group) if isinstance(value, dict) else [item for _, item in group]
        return Piece(f"{path}[{group[0][0]}..{group[-1][0]}]", _dump(held))

    for key, item in entries:
        text = _dump(item)
        if len(text) > MOST_CHARS:
            if group:
                yield close()
                group, size = [], 0
            if isinstance(item, dict | list):
                yield from _json(item, f"{path}.{key}", repeats)
            continue
        if isinstance(value, list) and not repeats.is_new(text):
            continue
        if group and size + len(text) > USUAL_CHARS:
            yield close()
            group, size = [], 0
        group.append((key, item))
        size += len(text) + len(str(key)) + 8
    if group:
        yield close()


def pack(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Neighbouring pieces joined, and long ones split at paragraphs, lines or in the last resort anywhere.

    A rest shorter than `LEAST_CHARS` goes to the document before it; a file with less text than that gives nothing.
    """
    held: list[Piece] = []
    ready: Piece | None = None
    size = 0
    for piece in pieces:
        for part in _parts(piece):
            limit = USUAL_CHARS if size >= LEAST_CHARS else MOST_CHARS
            if held and size + len(part.text) > limit:
                if ready is not None:
                    yield ready
                ready = _join(held)
                held, size = [], 0
            held.append(part)
            size += len(part.text) + 2
    if held:
        last = _join(held)
        if ready is not None and len(last.text) < LEAST_CHARS:
            ready = _join([ready, last])
        else:
            if ready is not None:
                yield ready
            ready = last
    if ready is not None and len(ready.text) >= LEAST_CHARS:
        yield ready


def _join(pieces: list[Piece]) -> Piece:
    names = [piece.name for piece in pieces if piece.name]
    if not names:
        return Piece("", "\n\n".join(piece.text for piece in pieces))
    first, last = names[0].split(" .. ")[0], names[-1].split(" .. ")[-1]
    name = first if first == last else f"{first} .. {last}"
    return Piece(name, "\n\n".join(piece.text for piece in pieces))


def _parts(piece: Piece) -> Iterator[Piece]:
    """A piece, or when it is too long its paragraphs, lines or runs of characters."""
    if len(piece.text) <= MOST_CHARS:
        yield piece
        return
    for paragraph in paragraphs(piece.text):
        if len(paragraph) <= MOST_CHARS:
            yield Piece(piece.name, paragraph)
            continue
        block: list[str] = []
        size = 0
        for line in paragraph.split("\n"):
            for start in range(0, max(1, len(line)), MOST_CHARS):
                run = line[start : start + MOST_CHARS]
                if block and size + len(run) > MOST_CHARS:
                    yield Piece(piece.name, "\n".join(block))
                    block, size = [], 0
                block.append(run)
                size += len(run) + 1
        yield Piece(piece.name, "\n".join(block))

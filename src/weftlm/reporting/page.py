"""Pages as values: tables, figures, text and traces, written as HTML by the templates of this folder.

A page is a list of sections, a section a list of blocks. Templates escape everything and show names on one line with
nothing hidden (`printable`); nothing here writes HTML but `Markup` from this package's own files.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from weftlm import __version__
from weftlm.errors import DataError
from weftlm.files import write_whole
from weftlm.text import printable

DASH = "–"


@dataclass(frozen=True)
class Number:
    """A number as people read it, with its exact value for machines."""

    value: float
    text: str


Piece = str | Number


@dataclass(frozen=True)
class Cell:
    """One cell of a table's body.

    Attributes:
        content: what is shown, one piece or several.
        error: standard error, shown after it as ± error.
        sub: a second line in small type.
        best: what makes it bold, in a word that is read aloud: lowest, highest, largest.
        swatch: a CSS colour before it.
        style: CSS class of a frame around it.
    """

    content: Piece | Sequence[Piece] = DASH
    error: Piece | None = None
    sub: Piece | Sequence[Piece] | None = None
    best: str = ""
    swatch: str = ""
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a caption; the first cell of a row names it.

    Attributes:
        caption: what the numbers are.
        heads: column headers; a tuple is broken into lines.
        rows: cells, one per header.
        style: CSS classes.
        words: columns of words, left-aligned.
        fold: the line that opens it; empty where it is shown.
        opened: whether a folded table is open at first.
    """

    kind: ClassVar[str] = "table"
    caption: str
    heads: Sequence[str | tuple[str, ...]]
    rows: Sequence[Sequence[Cell]]
    style: str = ""
    words: Sequence[int] = (0,)
    fold: str = ""
    opened: bool = False


@dataclass(frozen=True)
class Figure:
    """A chart with its caption."""

    kind: ClassVar[str] = "figure"
    svg: Markup
    caption: str


@dataclass(frozen=True)
class Text:
    """A paragraph, or a heading (`style` h3)."""

    kind: ClassVar[str] = "text"
    text: str | Sequence[Piece]
    style: str = ""


@dataclass(frozen=True)
class Warnings:
    """What is missing or to be known, one item each: who it is about (may be empty), and a sentence."""

    kind: ClassVar[str] = "warnings"
    label: str
    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Terms:
    """What the terms of a report mean; `repeated` adds those of runs that differ only in their seed."""

    kind: ClassVar[str] = "terms"
    repeated: bool


@dataclass(frozen=True)
class Code:
    """Text as it was written, folded away under a line."""

    kind: ClassVar[str] = "code"
    fold: str
    text: str


@dataclass(frozen=True)
class Command:
    """What a command is for, the model it is about, and the command."""

    kind: ClassVar[str] = "command"
    why: str
    name: str
    command: str


@dataclass(frozen=True)
class Box:
    """Blocks in a frame of their own."""

    kind: ClassVar[str] = "box"
    blocks: Sequence[Block]


@dataclass(frozen=True)
class TraceBlock:
    """The chart of the weight every token gave to every expert; `weftlm.reporting.traces.trace_block` makes it.

    Attributes:
        key: id in the page.
        text: the traced text, without what a page cannot hold.
        data: what trace.js reads.
        experts: one row per expert: name, place, share, tokens led, and `TypicalToken`s.
        fold: the line that opens it; empty where it is shown.
        full: whether layers, modules and characteristic tokens are shown too.
    """

    kind: ClassVar[str] = "trace"
    key: str
    text: str
    data: dict[str, Any]
    experts: Sequence[tuple[str, int, Piece, int, Sequence[Any]]]
    fold: str = ""
    full: bool = True


Block = Table | Figure | Text | Warnings | Terms | Code | Command | Box | TraceBlock


@dataclass(frozen=True)
class Section:
    """A part of a page: anchor, short name for the contents, heading, and blocks; left out where it has none."""

    key: str
    short: str
    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: of the page.
        kicker: the line above it.
        headline: what was found, in a sentence.
        sections: in order; empty ones are left out.
        opening: blocks before the contents.
        source: what the footer names as the origin of the page.
    """

    title: str
    kicker: str
    headline: str
    sections: Sequence[Section]
    opening: Sequence[Block] = field(default=())
    source: str = ""


def render_page(page: Page) -> str:
    """A page as HTML that loads nothing. Its policy allows its own scripts alone, so text given as data never runs."""
    sections = [one for one in page.sections if one.blocks]
    traced = any(isinstance(block, TraceBlock) for one in sections for block in one.blocks)
    scripts = [Markup(page_file("theme.js")), *([Markup(page_file("trace.js"))] if traced else [])]
    hashes = " ".join(f"'sha256-{_digest(one)}'" for one in scripts)
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            sections=sections,
            version=__version__,
            policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}",
            styles=[Markup(page_file(f"{name}.css")) for name in ("theme", "report", *(["trace"] if traced else []))],
            scripts=scripts,
        )
    )


def write_page(page: Page, output: str | Path) -> Path:
    """Write a page as UTF-8, whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    output, text = Path(output), render_page(page)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, text)
    except OSError as error:
        raise DataError(f"the page {output} cannot be written: {error.strerror}") from error
    return output


def page_file(name: str) -> str:
    """A file of the folder templates/, as text."""
    return resources.files("weftlm.reporting").joinpath(f"templates/{name}").read_text(encoding="utf-8").strip()


def exact(value: float, text: str) -> Piece:
    """A number; a dash where it is not finite."""
    return Number(value, text) if math.isfinite(value) else DASH


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("weftlm.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters["exact"] = repr
    return environment


def _shown(value: object) -> object:
    """What a template writes: text in which every character can be seen, and `Markup` as it is."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

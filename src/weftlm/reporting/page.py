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
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from weftlm import __version__
from weftlm.errors import DataError
from weftlm.files import write_whole
from weftlm.text import printable

DASH = "–"
OPEN_ROWS = 15
"""Rows up to which a folded table is open at first."""


@dataclass(frozen=True)
class Number:
    """A number as people read it, with its exact value for machines."""

    value: float
    text: str


Piece = str | Number
Line = Piece | tuple[Piece, ...]


@dataclass(frozen=True)
class Cell:
    """One cell of a table's body.

    Attributes:
        content: Text, one piece or several.
        sub: Lines below it in small type.
        best: Reason it is bold, read aloud: lowest, highest, largest.
        swatch: CSS colour of a square before it.
        style: CSS class of a frame around it.
    """

    content: Line = DASH
    sub: Sequence[Line] = ()
    best: str = ""
    swatch: str = ""
    style: str = ""


class Block:
    """A part of a section; the macro of its class's name writes it."""

    @property
    def kind(self) -> str:
        """Name of the macro."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Table(Block):
    """A table with a caption; the first cell of a row names it.

    Attributes:
        caption: Meaning of the numbers.
        heads: Column headers.
        rows: Cells, one per header.
        style: CSS classes.
        words: Columns of words, left-aligned.
        fold: Line that opens the table; empty where it is always shown.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    style: str = ""
    words: Sequence[int] = (0,)
    fold: str = ""

    @property
    def opened(self) -> bool:
        """Whether a folded table is open at first."""
        return len(self.rows) <= OPEN_ROWS


@dataclass(frozen=True)
class Figure(Block):
    """A chart with its caption."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Text(Block):
    """A paragraph, a warning (`style` warning), or a heading (h3)."""

    text: Line
    style: str = ""


@dataclass(frozen=True)
class Terms(Block):
    """What the terms of a report mean."""


@dataclass(frozen=True)
class Code(Block):
    """Text as it was written; folded under a line where there is one."""

    text: str
    fold: str = ""


@dataclass(frozen=True)
class TraceBlock(Block):
    """The chart of the weight every token gave to every expert; `weftlm.reporting.traces.trace_block` makes it.

    Attributes:
        key: Id in the page.
        text: Traced text, without what a page cannot hold.
        data: What trace.js reads.
        fold: Line that opens it; empty where it is shown.
    """

    key: str
    text: str
    data: dict[str, Any]
    fold: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page: anchor, heading, and blocks; left out where it has none."""

    key: str
    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: Heading of the page.
        kicker: Line above the title.
        headline: Finding, in a sentence.
        sections: Parts in order; empty ones are left out.
        answer: Framed blocks under the headline: what to serve, and what helped.
        notes: Sentences under the answer.
    """

    title: str
    kicker: str
    headline: str
    sections: Sequence[Section]
    answer: Sequence[Block] = ()
    notes: Sequence[str] = ()


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

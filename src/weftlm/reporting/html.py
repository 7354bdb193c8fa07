"""HTML as text: everything from a user is escaped, every table can be read aloud."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weftlm.errors import DataError
from weftlm.files import write_whole
from weftlm.text import printable

DASH = "–"


@dataclass(frozen=True)
class Cell:
    """One cell of a table's body.

    Attributes:
        html: its content, already escaped.
        align: "number" (right) or "text" (left).
        header: whether it names its row.
    """

    html: str
    align: str = "number"
    header: bool = False


def escape(text: object) -> str:
    """Text as HTML, in an element or an attribute, on one line and with nothing hidden (`printable`)."""
    return html.escape(printable(text), quote=True)


def data(value: float, text: str) -> str:
    """A number as people read it, with its exact value for machines; a dash where there is none."""
    return f'<data value="{value!r}">{escape(text)}</data>' if math.isfinite(value) else DASH


def table(caption: str, head: str, rows: Sequence[Sequence[Cell]], *, kind: str = "") -> str:
    """A table with a caption; `head` is the inside of its `thead`, already HTML."""
    body = "\n".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    name = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll"><table{name}><caption>{caption}</caption>\n<thead>{head}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    name = f' class="{cell.align}"'
    return f'<th scope="row"{name}>{cell.html}</th>' if cell.header else f"<td{name}>{cell.html}</td>"


def column_head(names: Sequence[str], first_align: str = "text") -> str:
    """One row of column headers, the first one left-aligned."""
    cells = [
        f'<th scope="col" class="{first_align if position == 0 else "number"}">{name}</th>'
        for position, name in enumerate(names)
    ]
    return f"<tr>{''.join(cells)}</tr>"


def details(summary: str, inside: str, *, is_open: bool = False) -> str:
    """A part that opens on a click; `summary` and `inside` are HTML."""
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>\n{inside}\n</details>"


def section(key: str, title: str, inside: str) -> str:
    """A section with an anchor."""
    return (
        f'<section id="{key}" aria-labelledby="{key}-title">\n<h2 id="{key}-title">{title}</h2>\n{inside}\n</section>'
    )


def figure(svg: str, caption: str) -> str:
    """A chart with its caption; `caption` is HTML."""
    return f"<figure>\n{svg}\n<figcaption>{caption}</figcaption>\n</figure>"


def write_page(page: str, output: str | Path) -> Path:
    """Write a page as UTF-8, whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    output = Path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, page)
    except OSError as error:
        raise DataError(f"the page {output} cannot be written: {error.strerror}") from error
    return output

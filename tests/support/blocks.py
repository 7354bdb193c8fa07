"""Blocks of a report's page as HTML, and a page as a browser or a screen reader would read it."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser

from weftlm.reporting.page import Block, Page, Section, Table, render_page

VOID = {"meta", "br", "link", "img", "input", "hr", "line", "path"}


def render_blocks(blocks: Sequence[Block]) -> str:
    """What a page writes for some blocks, without the rest of the page."""
    page = render_page(Page("title", "kicker", "headline", [Section("one", "one", [*blocks])]))
    return page.partition("</h2>\n")[2].partition("</section>")[0]


Cell = tuple[str, list[float]]
"""Text of a cell, and the exact values in it."""


class Html(HTMLParser):
    """Elements, text, scripts, traced text and tables of a page; every tag closes."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: dict[str, list[list[Cell]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.styles = self.traced = self._caption = ""
        self.scripts: list[str] = []
        self._open: list[tuple[str, str]] = []
        self._rows: list[list[Cell]] = []
        self.feed(text)
        self.close()
        assert self._open == [], self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self._open.append((tag, dict(attrs).get("class") or ""))
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "script":
            self.scripts.append("")
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append(("", []))
        elif tag == "data" and self._rows and self._rows[-1] and any(name in ("td", "th") for name, _ in self._open):
            self._rows[-1][-1][1].append(float(dict(attrs)["value"] or "nan"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag, (tag, self.getpos())
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        inside = [name for name, _ in self._open]
        if "style" in inside:
            self.styles += data
        elif "script" in inside:
            self.scripts[-1] += data
        else:
            self.text += data
        if any(kind == "tokens" for _, kind in self._open):
            self.traced += data
        if "caption" in inside:
            self._caption += data
        elif ("td" in inside or "th" in inside) and self._rows:
            text, values = self._rows[-1][-1]
            self._rows[-1][-1] = (text + data, values)

    def rows(self, caption: str) -> dict[str, list[Cell]]:
        """Cells by the name of their row (its first line), of the first table whose caption begins so."""
        found = next(rows for name, rows in self.tables.items() if name.startswith(caption))
        return {row[0][0]: row[1:] for row in found}

    def count(self, tag: str) -> int:
        """Elements of one kind."""
        return sum(name == tag for name, _ in self.elements)


def table_rows(blocks: Sequence[Block], caption: str = "") -> dict[str, list[Cell]]:
    """Cells by the label of their row, of the first table of some blocks whose caption begins so."""
    for block in blocks:
        if isinstance(block, Table) and block.caption.startswith(caption):
            (rows,) = Html(render_blocks([block])).tables.values()
            return {str(row[0].content): cells[1:] for row, cells in zip(block.rows, rows[1:], strict=True)}
    raise AssertionError(f"no table begins with {caption!r}")
